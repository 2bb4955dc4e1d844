"""
A clock that a linear layer can read
====================================

When people shop depends on the hour and on the weekday. A linear layer cannot read that from a timestamp, nor from
its logarithm; from the log-periodic encoding, with waves of a day and a week among its periods, it can. Seed 0; the
data is invented here.
"""

import matplotlib.pyplot as plt
import torch

import recblocks

torch.manual_seed(0)
hour, day, week = 3600, 86_400, 604_800
begin = 1_700_000_000
time = begin + torch.randint(26 * week, (4096,))  # int64 seconds of half a year


def activity(time):
    of_day = torch.cos(2 * torch.pi * (time % day - 20 * hour) / day)
    of_week = torch.cos(2 * torch.pi * (time % week - 2 * day) / week)
    return of_day + of_week


# %%
# Least squares on what each form of the time gives, judged in the half year that follows.

later = begin + torch.arange(26 * week, 52 * week, 997)


def forms(time):
    seconds = time.double()[:, None]
    return {
        "timestamp": seconds / begin,
        "log of the timestamp": seconds.log(),
        "log-periodic": recblocks.log_periodic_features(time, periods=recblocks.PINNERFORMER_PERIODS).double(),
    }


explained, fitted = {}, {}
for name, given in forms(time).items():
    shift, scale = given.mean(0), given.std(0)
    inputs = torch.nn.functional.pad((given - shift) / scale, (0, 1), value=1.0)
    weights = torch.linalg.lstsq(inputs, activity(time).double()).solution
    fitted[name] = torch.nn.functional.pad((forms(later)[name] - shift) / scale, (0, 1), value=1.0) @ weights
    left = (fitted[name] - activity(later)).square().mean() / activity(later).double().var()
    explained[name] = 1 - left.item()
print({name: round(share, 3) for name, share in explained.items()})

# %%
# A week of what was fitted.

figure, axes = plt.subplots(figsize=(7.2, 3), layout="constrained")
days = (later - later[0]) / day
first = days < 7
axes.plot(days[first], activity(later)[first], color="#b9b2a6", linewidth=4, label="truth")
for name, values in fitted.items():
    axes.plot(days[first], values[first], label=name)
axes.set_xlabel("days")
axes.set_ylabel("activity")
axes.set_ylim(-3, 3)
axes.legend(frameon=False, ncols=2)
assert explained["log-periodic"] > 0.99 > 0.1 > explained["timestamp"]
