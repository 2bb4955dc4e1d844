"""Definitions as scalar loops over Python numbers. Nothing here imports recblocks, and nothing here is fast."""

import itertools
import math

import mpmath

# --- times ---


def log_periodic_features(t, periods, phase, units_per_second):
    """One time's features by the formula, in 60 digits; t and the periods are taken as the exact numbers they are."""
    with mpmath.workdps(60):
        seconds = mpmath.mpf(t) / units_per_second
        features = []
        for i, period in enumerate(periods):
            angle = 2 * mpmath.pi * seconds / mpmath.mpf(period)
            features.append(float(mpmath.cos(angle + phase[2 * i])))
            features.append(float(mpmath.sin(angle + phase[2 * i + 1])))
        features.append(float(mpmath.log(1 + max(seconds, 0))))
        return features


def time_since_latest(times, valid):
    """One newest-first sequence."""
    latest = None
    answer = []
    for time, real in zip(times, valid, strict=True):
        if real and latest is None:
            latest = time
        answer.append(latest - time if real else 0)
    return answer


def gap_to_next_older(times, valid):
    """One newest-first sequence."""
    answer = []
    for i in range(len(times)):
        older = [times[j] for j in range(i + 1, len(times)) if valid[j]]
        answer.append(times[i] - older[0] if valid[i] and older else 0)
    return answer


# --- evaluation -------------------------------------------------------------------------------------------------


def euclidean_distance(u, v):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(u, v, strict=True)))


def positive_rank(scores, positive, absent=()):
    """How many other items score at least as much (scores: one number an item, larger is closer)."""
    rank = 0
    for item in range(len(scores)):
        if item != positive and item not in absent and not scores[item] < scores[positive]:
            rank += 1
    return rank


def recall_at_k(queries, corpus, positives, k, in_corpus=None, excluded=()):
    """PinnerFormer 4.1 over sets of positives; squared distances of integers are exact."""
    users = []
    for q, query in enumerate(queries):
        own = {item for user, item in positives if user == q}
        hits = 0
        for positive in own:
            mine = sum((a - b) ** 2 for a, b in zip(query, corpus[positive], strict=True))
            nearer = 0
            for item, vector in enumerate(corpus):
                if item == positive or (q, item) in excluded or (in_corpus is not None and not in_corpus[item]):
                    continue
                if mine >= sum((a - b) ** 2 for a, b in zip(query, vector, strict=True)):
                    nearer += 1
            hits += nearer < k
        if own:
            users.append(hits / len(own))
    return sum(users) / len(users)


def ranking_metrics(ranks, k):
    """One user's recall, hit rate, reciprocal rank and NDCG from the ranks (from 0) of their positives."""
    recall = sum(rank < k for rank in ranks) / len(ranks)
    hit = float(any(rank < k for rank in ranks))
    reciprocal = 1 / (1 + min(ranks))
    gain = sum(1 / math.log2(rank + 2) for rank in ranks if rank < k)
    ideal = sum(1 / math.log2(place + 2) for place in range(min(k, len(ranks))))
    return recall, hit, reciprocal, gain / ideal


def round_robin(lists, k):
    """Lists of one user, the weightiest first, blended turn by turn; what was shown is passed over."""
    blend = []
    for place in range(max(len(one) for one in lists)):
        for one in lists:
            if place < len(one) and one[place] not in blend:
                blend.append(one[place])
    return blend[:k]


# ---- timelines ----


def newest_first(rows):
    """user -> positions of its rows, newest first, equal times as they came; a row is (user, time, ...)."""
    found = {}
    for position, row in enumerate(rows):
        found.setdefault(row[0], []).append(position)
    for positions in found.values():
        for sorted_end in range(1, len(positions)):  # insertion sort: stable, and plainly so
            at = sorted_end
            while at > 0 and rows[positions[at]][1] > rows[positions[at - 1]][1]:
                positions[at], positions[at - 1] = positions[at - 1], positions[at]
                at -= 1
    return found


# --- count-min sketch ---


def splitmix64(seed, index):
    """The index-th output (from 0) of Vigna's splitmix64 started at this seed."""
    z = (seed + 0x9E3779B97F4A7C15 * (index + 1)) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


def half_mix(item, offset):
    """64 bits, as an unsigned number: add the offset, then half of splitmix64's finaliser."""
    z = (item + offset) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 32)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 29)


def sketch_bucket(item, row, width, seed):
    """Which of a row's counters an id has."""
    multiplier = splitmix64(seed, 2 * (row // 2) + 1) | 1
    product = (half_mix(item, splitmix64(seed, 0)) * multiplier) & 0xFFFFFFFFFFFFFFFF
    half = product >> 32 if row % 2 == 0 else product & 0xFFFFFFFF
    return half * width // 2**32


def sketch_answers(stream, queries, width, depth, seed):
    """What a count-min sketch answers after a stream of (id, count), in whole numbers."""
    counters = [[0] * width for _ in range(depth)]
    for item, count in stream:
        for row in range(depth):
            counters[row][sketch_bucket(item, row, width, seed)] += count
    return [min(counters[row][sketch_bucket(item, row, width, seed)] for row in range(depth)) for item in queries]


# --- actions and items ---


def drop_out_of_vocabulary(action_type, surface, valid, num_action_types, num_surfaces, max_len):
    """One row: the slots kept, and how many were dropped for their type, for their surface, and for their age."""
    slots, of_type, of_surface, of_age = [], 0, 0, 0
    for slot in range(len(valid)):
        if not valid[slot]:
            continue
        if action_type[slot] not in range(num_action_types):
            of_type += 1
        elif surface[slot] not in range(num_surfaces):
            of_surface += 1
        elif len(slots) == max_len:
            of_age += 1
        else:
            slots.append(slot)
    return slots, of_type, of_surface, of_age


def action_vector(item, type_row, surface_row, duration, times, units_per_second):
    """PinnerFormer 3.1; times: (t, periods, phase) of the absolute time and of the two differences."""
    vector = [*item, *type_row, *surface_row, math.log(1 + duration)]
    for t, periods, phase in times:
        vector += log_periodic_features(t, periods, phase, units_per_second)
    return vector


def gelu(x):
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def affine(weight, bias, x):
    return [sum(w * a for w, a in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def unit(x):
    length = math.sqrt(sum(a * a for a in x))
    return [a / length for a in x]


def item_vector(x, w1, b1, w2, b2):
    """PinnerFormer 3.2: the MLP, then the L2 norm."""
    return unit(affine(w2, b2, [gelu(a) for a in affine(w1, b1, x)]))


def possible_anchors(times, until):
    """Places of one user's newest-first times: the newest action of each event that has a later one up to until."""
    kept = [at for at, time in enumerate(times) if until is None or time <= until]
    begins = [at for at in kept if at == kept[0] or times[at - 1] != times[at]]
    return [at for at in begins if any(times[j] > times[at] for j in kept)]


def next_event(times, at, until):
    """Places of the actions of the first event later than place ``at``; empty if there is none up to until."""
    later = [time for time in times if time > times[at] and (until is None or time <= until)]
    return [j for j, time in enumerate(times) if later and time == min(later)]


def window_positives(times, positive, at, window, until):
    """Places of the positives in (t, t + window], none after until."""
    return [
        j
        for j, time in enumerate(times)
        if positive[j] and times[at] < time <= times[at] + window and (until is None or time <= until)
    ]


def input_slots(times, anchor, max_len):
    """The places of a sequence's slots, newest first."""
    return list(range(anchor, min(anchor + max_len, len(times))))


# --- diversity and the bootstrap ---


def interest_entropy_at_k(lists, topics, k):
    entropies = []
    for one in lists:
        found = [topics[item] for item in one[:k]]
        shares = [found.count(topic) / len(found) for topic in set(found)]
        entropies.append(-sum(share * math.log(share) for share in shares))
    return sum(entropies) / len(entropies)


def coverage_at_k(lists, num_items, k, percent):
    """percent is a whole number, so every comparison is exact."""
    shown = [item for one in lists for item in one[:k]]
    counts = sorted((shown.count(item) for item in set(shown)), reverse=True)
    used = 0
    while 100 * sum(counts[:used]) < percent * len(shown):
        used += 1
    return used / num_items


def mean_over_columns(values, present, drawn):
    """Mean over columns of the mean over the drawn users that have a value there."""
    means = []
    for column in range(len(values[0])):
        there = [values[user][column] for user in drawn if present[user][column]]
        if there:
            means.append(sum(there) / len(there))
    return sum(means) / len(means)


# --- negatives ---


def mixed_log_q(count, total, num_in_batch, num_random, num_candidates, correct_positive):
    """One item; sums over the columns of the pool, each drawn from its own source."""
    chance = 0.0
    for _ in range(num_in_batch):
        chance += max(count, 1) / total
    for _ in range(num_random):
        chance += 1 / num_candidates
    if correct_positive:
        chance /= num_in_batch + num_random
    return math.log(chance)


# --- the causal sequence encoder ---


def add(x, y):
    return [a + b for a, b in zip(x, y, strict=True)]


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def layer_norm(weight, bias, x):
    mean = sum(x) / len(x)
    variance = sum((a - mean) ** 2 for a in x) / len(x)
    return [w * (a - mean) / math.sqrt(variance + 1e-5) + b for w, b, a in zip(weight, bias, x, strict=True)]


def causal_encoder_row(xs, valid, weights, num_layers, num_heads):
    """PinnerFormer A.2 for one newest-first row: each slot's unit vector, or None where invalid; weights by name."""

    def apply(kind, name, x):
        return kind(weights[f"{name}.weight"], weights[f"{name}.bias"], x)

    def mlp(hidden, out, x):
        return apply(affine, out, [gelu(a) for a in apply(affine, hidden, x)])

    slots = [i for i in range(len(xs)) if valid[i]]
    position = weights["position"]
    size = len(position[0]) // num_heads
    v = {i: add([dot(row, xs[i]) for row in weights["project.weight"]], position[i]) for i in slots}
    for layer in range(num_layers):
        block = f"blocks.{layer}."
        queries, keys, values = {}, {}, {}
        for i in slots:
            qkv = apply(affine, block + "qkv", apply(layer_norm, block + "attention_norm", v[i]))
            heads = [qkv[start : start + size] for start in range(0, len(qkv), size)]
            queries[i], keys[i], values[i] = heads[:num_heads], heads[num_heads:-num_heads], heads[-num_heads:]
        for i in slots:
            seen = [j for j in slots if j >= i]
            attended = []
            for head in range(num_heads):
                scores = [dot(queries[i][head], keys[j][head]) / math.sqrt(size) for j in seen]
                shares = [math.exp(score - max(scores)) for score in scores]
                attended += [dot(shares, [values[j][head][d] for j in seen]) / sum(shares) for d in range(size)]
            u = add(v[i], apply(affine, block + "attention_out", attended))
            normed = apply(layer_norm, block + "ffn_norm", u)
            v[i] = add(u, mlp(block + "ffn_hidden", block + "ffn_out", normed))
    return [
        unit(mlp("out_hidden", "out", apply(layer_norm, "out_norm", v[i]))) if valid[i] else None
        for i in range(len(xs))
    ]


# --- evaluation protocols ---


def reference_time(positive, start, protocol, num_days, day):
    """PinnerFormer 4.2.2, day by day."""
    if protocol == "once":
        return start
    if protocol == "realtime":
        return positive - 1
    for number in range(num_days):
        x = start + number * day
        if x < positive <= x + day:
            return x - day
    raise ValueError("outside the window")


def clean(records, clock_bound, time_range, action_types):
    """(kept records in the order of arrival, merged counts, dropped counts), one record after the other."""
    dropped, merged, groups = {}, {}, {}

    def count(counts, reason):
        counts[reason] = counts.get(reason, 0) + 1

    actions = []
    for place, record in enumerate(records):
        if not time_range[0] <= record["time"] <= time_range[1]:
            count(dropped, "time_out_of_range")
        elif record["action_type"] not in action_types:
            count(dropped, "unknown_action_type")
        elif not math.isfinite(record["duration"]):
            count(dropped, "duration_not_finite")
        elif record["duration"] < 0:
            count(dropped, "negative_duration")
        else:
            key = tuple(record[name] for name in ("user", "item", "action_type", "surface"))
            same = [one for one in actions if one["key"] == key and one["record"]["time"] == record["time"]]
            if same:
                count(merged, "same_time")
                same[0]["sources"].add(record["source"])
                same[0]["longest"] = max(same[0]["longest"], record["duration"])
            else:
                actions.append(
                    {
                        "key": key,
                        "place": place,
                        "record": record,
                        "sources": {record["source"]},
                        "longest": record["duration"],
                    }
                )
    kept = []
    for action in sorted(actions, key=lambda one: one["record"]["time"]):
        groups.setdefault(action["key"], [])
        for opened in groups[action["key"]]:  # the earliest opened first
            near = clock_bound is not None and action["record"]["time"] - opened["record"]["time"] <= clock_bound
            if near and not opened["sources"] & action["sources"]:
                count(merged, "clock_difference")
                opened["sources"] |= action["sources"]
                opened["longest"] = max(opened["longest"], action["longest"])
                break
        else:
            groups[action["key"]].append(action)
            kept.append(action)
    kept.sort(key=lambda one: one["place"])
    return [one["record"] | {"duration": one["longest"]} for one in kept], merged, dropped


def user_share(user, salt):
    """The share in [0, 1) of a raw user id: splitmix64 of its bits and the salt's hash, the upper 53 bits."""

    def splitmix64(state):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    return (splitmix64((user % 2**64) ^ splitmix64(salt % 2**64)) >> 11) / 2**53


# --- the sampled softmax loss ---


def is_own_positive(user, item, positives):
    """Whether (user, item) is among the batch's positive pairs."""
    return any(user == u and item == i for u, i in positives)


def sampled_softmax_pair(query, positive, log_q_positive, columns, temperature):
    """-log softmax of the positive among itself and the columns (embedding, log q) that its row may see."""
    if not columns:
        return 0.0
    score = sum(a * b for a, b in zip(query, positive, strict=True)) / temperature - log_q_positive
    scores = [score]
    for embedding, log_q in columns:
        scores.append(sum(a * b for a, b in zip(query, embedding, strict=True)) / temperature - log_q)
    largest = max(scores)
    return math.log(math.fsum(math.exp(one - largest) for one in scores)) + largest - score


def dense_all_action_row(query, positives, negatives, window, temperature, correct_positive):
    """The sum of a query's pair losses, and how many there are.

    Args:
        query: (embedding, user, time).
        positives: of (embedding, user, time, item, log q).
        negatives: of (embedding, item, log q).
    """
    embedding, user, time = query
    known = [(whose, item) for _, whose, _, item, _ in positives]
    pool = [(one, item, log_q) for one, _, _, item, log_q in positives] + negatives
    seen = [(one, log_q) for one, item, log_q in pool if not is_own_positive(user, item, known)]
    losses = []
    for one, whose, when, _, log_q in positives:
        if whose == user and 0 < when - time <= window:
            corrected = log_q if correct_positive else 0.0
            losses.append(sampled_softmax_pair(embedding, one, corrected, seen, temperature))
    return math.fsum(losses), len(losses)


def weighted_mean(values, weights):
    """0 where the weights add up to 0."""
    total = math.fsum(weights)
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0


# --- the blocks around a sequence model: fusion, masks, compression, aggregators ---


def fuse_concat(actions, candidate):
    """One sequence: each action and then the candidate."""
    return [[*action, *candidate] for action in actions]


def fuse_append(actions, candidate, valid, width):
    """One sequence: the actions, then zeros for a type and the candidate as the item."""
    zeros = [0.0] * (width - len(candidate))
    return [*actions, [*zeros, *candidate]], [*valid, True]


def time_window_mask(action_times, request_time, window):
    """One sequence: what is older than the request, and by less than the window; Python compares exactly."""
    return [0 < request_time - time < window for time in action_times]


def compress_output(xs, valid, columns, max_pool, width):
    """One sequence: the chosen columns one after the other, zeros for an absent one, and then the maximum."""
    flat = []
    for column in columns:
        present = column < len(xs) and valid[column]
        flat.extend(xs[column] if present else [0.0] * width)
    if max_pool:
        for d in range(width):
            values = [x[d] for x, real in zip(xs, valid, strict=True) if real]
            flat.append(max(values) if values else 0.0)
    return flat


def average_pool(xs, valid, width):
    """One sequence."""
    present = [x for x, real in zip(xs, valid, strict=True) if real]
    return [math.fsum(x[d] for x in present) / max(len(present), 1) for d in range(width)]


def cnn_aggregate(xs, valid, weight, bias):
    """One sequence; weight is [channel][width][step]. The greatest relu of the windows that hold a valid slot."""
    width, kernel_size = len(weight[0]), len(weight[0][0])
    greatest = [0.0] * len(bias)
    for start in range(len(xs)):
        window = [slot for slot in range(start, start + kernel_size) if slot < len(xs) and valid[slot]]
        for channel in range(len(bias) if window else 0):
            answer = bias[channel]
            for slot in window:
                for d in range(width):
                    answer += weight[channel][d][slot - start] * xs[slot][d]
            greatest[channel] = max(greatest[channel], answer)
    return greatest


def recurrent_aggregate(xs, valid, weights, num_layers, hidden_dim, is_lstm):
    """One sequence, newest first; the top layer's state after the newest valid action. Gates as torch orders them."""
    sequence = [x for x, real in zip(xs, valid, strict=True) if real][::-1]
    for layer in range(num_layers):
        state, cell = [0.0] * hidden_dim, [0.0] * hidden_dim
        states = []
        for x in sequence:
            below = affine(weights[f"weight_ih_l{layer}"], weights[f"bias_ih_l{layer}"], x)
            before = affine(weights[f"weight_hh_l{layer}"], weights[f"bias_hh_l{layer}"], state)
            gates = add(below, before)
            if is_lstm:
                i, f, g, o = (gates[k * hidden_dim : (k + 1) * hidden_dim] for k in range(4))
                cell = [logistic(f[d]) * cell[d] + logistic(i[d]) * math.tanh(g[d]) for d in range(hidden_dim)]
                state = [logistic(o[d]) * math.tanh(cell[d]) for d in range(hidden_dim)]
            else:
                state = [math.tanh(gate) for gate in gates]
            states.append(state)
        sequence = states
    return sequence[-1] if sequence else [0.0] * hidden_dim


def logistic(x):
    return 1 / (1 + math.exp(-x))


# --- feature crosses ---


def matrix_vector(matrix, vector):
    return [math.fsum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def cross(first, x, transformed):
    """DCN v2, equation 1, once W x + b is known."""
    return [a * t + b for a, t, b in zip(first, transformed, x, strict=True)]


def cross_full_rank(first, x, weight, bias):
    return cross(first, x, [y + b for y, b in zip(matrix_vector(weight, x), bias, strict=True)])


def cross_low_rank(first, x, u, v, bias):
    """W = U V^T; u[d][r] and v[d][r]."""
    return cross_full_rank(
        first, x, [[math.fsum(a * b for a, b in zip(p, q, strict=True)) for q in v] for p in u], bias
    )


def cross_experts(first, x, experts, gate, bias):
    """DCN v2, equations 3 and 4; an expert is (u[d][r], c[r][r], v[d][r]), gate has one row an expert."""
    scores = [math.exp(score) for score in matrix_vector(gate, x)]
    out = list(x)
    for score, (u, c, v) in zip(scores, experts, strict=True):
        hidden = [max(h, 0.0) for h in matrix_vector(list(zip(*v, strict=True)), x)]
        hidden = [max(h, 0.0) for h in matrix_vector(c, hidden)]
        expert = matrix_vector(u, hidden)
        for d in range(len(out)):
            out[d] += score / math.fsum(scores) * first[d] * (expert[d] + bias[d])
    return out


# --- the label-weighted cross entropy ---


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def binary_cross_entropy(logit, label):
    """-y log f - (1 - y) log(1 - f), where f and 1 - f are the sigmoids of the logit and of its negative."""
    return -label * log_sigmoid(logit) - (1 - label) * log_sigmoid(-logit)


def label_weighted_bce(logits, labels, matrix, base):
    """One row's weighted cross entropy of each head: TransAct, equations 1 and 2, matrix[head][action]."""
    losses = []
    for h in range(len(logits)):
        weight = base[h] + math.fsum(matrix[h][a] * labels[a] for a in range(len(labels)))
        losses.append(weight * binary_cross_entropy(logits[h], labels[h]))
    return losses


# --- realtime actions ---


def without_late(records, lateness, is_valid):
    """The records that are not late, and how many are: older than their user's newest valid one by more than that."""
    newest, kept, late = {}, [], 0
    for record in records:
        if is_valid(record):
            if record["time"] < newest.get(record["user"], record["time"]) - lateness:
                late += 1
                continue
            newest[record["user"]] = max(newest.get(record["user"], record["time"]), record["time"])
        kept.append(record)
    return kept, late


def newest_actions(cleaned, user, request_time, num_actions):
    """A user's newest cleaned records before a request, newest first, of equal times by item, type and surface."""
    earlier = [record for record in cleaned if record["user"] == user and record["time"] < request_time]
    earlier.sort(key=lambda one: (-one["time"], one["item"], one["action_type"], one["surface"]))
    return earlier[:num_actions]


# --- ranking: top k of a chunk, AUC, calibration ---


def expected_over_orders(scores, k, measure):
    """Mean of ``measure`` of the first k rows over every order in which no row follows a lower score."""
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return sum(measure(order[:k]) for order in orders) / len(orders)


def auc(scores, labels):
    """Pair by pair; None where one of the labels is missing."""
    wins, pairs = 0.0, 0
    for i, wanted in enumerate(labels):
        for j, unwanted in enumerate(labels):
            if wanted and not unwanted:
                pairs += 1
                wins += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    return wins / pairs if pairs else None


def calibration_error(probabilities, labels, num_bins):
    """Bins by the number of smaller probabilities; sum over bins of |sum of probabilities - actions| / rows."""
    bins = {}
    for p, y in zip(probabilities, labels, strict=True):
        place = sum(other < p for other in probabilities) * num_bins // len(probabilities)
        bins.setdefault(place, []).append((p, y))
    return math.fsum(abs(math.fsum(p - y for p, y in rows)) for rows in bins.values()) / len(probabilities)


# --- the action transformer ---


def sinusoid(slot, dim):
    angles = [slot / 10000 ** (2 * (k // 2) / dim) for k in range(dim)]
    return [math.cos(angle) if k % 2 else math.sin(angle) for k, angle in enumerate(angles)]


def post_norm_layer(tokens, weights, num_heads):
    """Attention is all you need, section 3, of a list of vectors that all see each other."""

    def apply(kind, name, x):
        return kind(weights[f"{name}.weight"], weights[f"{name}.bias"], x)

    size = len(tokens[0]) // num_heads
    heads = [range(head * size, (head + 1) * size) for head in range(num_heads)]
    qkv = [apply(affine, "qkv", token) for token in tokens]
    queries, keys, values = ([row[i * size * num_heads :] for row in qkv] for i in range(3))
    out = []
    for token, query in zip(tokens, queries, strict=True):
        attended = []
        for head in heads:
            scores = [sum(query[d] * key[d] for d in head) / math.sqrt(size) for key in keys]
            shares = [math.exp(score - max(scores)) for score in scores]
            attended += [dot(shares, [value[d] for value in values]) / sum(shares) for d in head]
        u = apply(layer_norm, "attention_norm", add(token, apply(affine, "attention_out", attended)))
        hidden = [max(a, 0.0) for a in apply(affine, "ffn_hidden", u)]
        out.append(apply(layer_norm, "ffn_norm", add(u, apply(affine, "ffn_out", hidden))))
    return out


def action_transformer_row(actions, valid, candidate, fusion, user, position, layers, num_heads):
    """TransAct 3.3: what stands in each slot (None where invalid), an appended candidate last; the user as a token.

    actions: [type | item] vectors. position: a function of the slot, -1 for an appended candidate; layers: weights.
    """
    slots = [slot for slot in range(len(actions)) if valid[slot]]
    tokens = [actions[slot] for slot in slots]
    if user is not None:
        tokens = [*tokens, user]
    if fusion == "concat":
        tokens = [[*token, *candidate] for token in tokens]
    if position is not None:
        tokens = [add(token, position(slot)) for slot, token in zip(slots, tokens, strict=False)] + tokens[len(slots) :]
    if fusion == "append":
        last = [0.0] * (len(actions[0]) - len(candidate)) + candidate
        tokens.append(last if position is None else add(last, position(-1)))
    for weights in layers:
        tokens = post_norm_layer(tokens, weights, num_heads) if tokens else []
    out = [None] * len(actions)
    for slot, token in zip(slots, tokens, strict=False):
        out[slot] = token
    return [*out, tokens[-1]] if fusion == "append" else out


class IdTable:
    """What a table of ids does, with a dict; ``seen`` counts exactly, where a sketch may count too much."""

    def __init__(self, capacity, admit_after=1, evicts=False):
        self.capacity, self.admit_after, self.evicts = capacity, admit_after, evicts
        self.rows, self.uses, self.seen, self.hand = {}, {}, {}, 0

    def insert(self, ids):
        """The row of each id, and those that begin; None where there is no room, and nothing has changed."""
        counts = {}
        for one in ids:
            counts[one] = counts.get(one, 0) + 1
        new = [
            one for one in counts if one not in self.rows and self.seen.get(one, 0) + counts[one] >= self.admit_after
        ]
        free = sorted(set(range(self.capacity)) - set(self.rows.values()))
        missing = max(0, len(new) - len(free))
        others = self.by_use(counts)
        if missing > (len(others) if self.evicts else 0):
            return None
        free += [row for row, _ in self.remove(others[:missing])]
        begun = sorted(free)[: len(new)]
        self.rows.update(zip(new, begun, strict=True))
        for one, count in counts.items():
            self.seen[one] = self.seen.get(one, 0) + count
            if one in self.rows:
                self.uses[one] = self.uses.get(one, 0) + count
        return [self.rows.get(one, -1) for one in ids], begun

    def erase(self, ids):
        """The rows that the ids had."""
        had = [self.rows.get(one, -1) for one in ids]
        for one in ids:
            self.rows.pop(one, None)
            self.uses.pop(one, None)
        return had

    def evict(self, num):
        """The ids that are used least and their rows."""
        return sorted(self.remove(self.by_use(())[:num]))

    def by_use(self, kept):
        """Rows and ids from the least used on, of equals first those after the row evicted last."""
        others = [one for one in self.rows if one not in kept]
        others.sort(key=lambda one: (self.uses[one], self.rows[one] < self.hand, self.rows[one]))
        return [(self.rows[one], one) for one in others]

    def remove(self, evicted):
        """Take the ids' rows away; the next eviction looks behind the last one."""
        for row, one in evicted:
            del self.rows[one], self.uses[one]
            self.hand = row + 1
        return evicted


def unseen_row(one, num_rows):
    """Which of so many rows an id without one of its own gets: 32 bits of a hash, scaled."""
    word = 2**64
    x = (one + 0x9E3779B97F4A7C15) % word
    x ^= x >> 32
    x = x * 0xBF58476D1CE4E5B9 % word
    x ^= x >> 29
    x = x * 0xBF58476D1CE4E5B9 % word
    return (x >> 32) * num_rows >> 32


def pooled_bags(vectors, bags, pooling):
    """Sum or mean of the vectors of each bag's ids, zeros where there are none; ``vectors`` says each id's."""
    dim = len(next(iter(vectors.values())))
    out = []
    for bag in bags:
        total = [sum(vectors[one][column] for one in bag) for column in range(dim)]
        out.append([one / len(bag) for one in total] if pooling == "mean" and bag else total)
    return out


def train_rows(weight, moment, steps, learning_rate, adagrad):
    """Rows after some steps of SGD or row-wise Adagrad; a step is (row, gradient) pairs, of which rows may repeat."""
    weight, moment = [list(row) for row in weight], list(moment)
    for pairs in steps:
        summed = {}
        for row, gradient in pairs:
            summed[row] = [a + b for a, b in zip(summed.get(row, [0.0] * len(gradient)), gradient, strict=True)]
        for row, gradient in summed.items():
            if adagrad:
                moment[row] += sum(g * g for g in gradient) / len(gradient)
                gradient = [g / (math.sqrt(moment[row]) + 1e-8) for g in gradient]
            weight[row] = [w - learning_rate * g for w, g in zip(weight[row], gradient, strict=True)]
    return weight, moment
