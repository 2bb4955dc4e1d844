"""A KeyedJaggedTensor filled newest first is the packed layout of our encoders."""

import importlib.util
import warnings

import pytest
import torch

import recblocks

if importlib.util.find_spec("torchrec") is None:
    pytest.skip("torchrec is not installed; the README says how", allow_module_level=True)


def test_a_keyed_jagged_tensor_feeds_the_packed_encoder():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fbgemm's own deprecations while it is imported
        from torchrec import KeyedJaggedTensor

    lengths = torch.tensor([2, 0, 3])
    jagged = KeyedJaggedTensor(keys=["items"], values=torch.tensor([4, 1, 3, 3, 0]), lengths=lengths)["items"]
    table = torch.randn(5, 8)
    encoder = recblocks.CausalSequenceEncoder(
        8, 4, hidden_dim=8, num_layers=1, num_heads=2, max_len=3, dropout=0.0
    ).double()
    features = table[jagged.values()].double()
    packed = encoder(features, offsets=jagged.offsets().long(), max_length=3)

    alone = [encoder(rows[None])[0] for rows in features.split(lengths.tolist()) if len(rows)]
    # float64 sums in another order: a few units of 2^-53 over some hundred terms of size 1
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-13)
