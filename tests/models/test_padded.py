"""The encoder with padding, for Apple's GPUs: here on CPU, beside transformers on the same ids."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from helpers import NATIVE, random_batch, reference_logits, vocabulary_of
from hypothesis import given
from hypothesis import strategies as some

from echelon.errors import InvalidInput
from echelon.models import device, encoder_padded
from echelon.models.architecture import LayerPlan, read_config
from echelon.models.base import pad, rounded_shape
from echelon.models.families import FAMILIES, native_model
from echelon.models.transformers import GenericScorer
from echelon.options import Options

EXACT = 1e-4
HALF_WIDTH = 0.02
APPLE = torch.device("mps")
LENGTHS = {"one": [7], "equal": [16] * 4, "mixed": [3, 41, 7, 1, 90, 17], "many": [5] * 37}


def opened(folder, precision="fp32"):
    """The scorer of a folder as on an Apple GPU, but on CPU."""
    native = native_model(folder, read_config(folder))
    plan = LayerPlan(precision)
    return encoder_padded.open_native(folder, native.shape, torch.device("cpu"), plan, 1, 0)


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_scores_are_those_of_the_reference(toy, family, lengths):
    folder = toy(family)
    batch = random_batch(lengths, vocabulary_of(folder), 1, types=family == "bert")
    scorer = opened(folder)
    found = scorer.score(batch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference_logits(folder, batch), rtol=0, atol=EXACT)
    assert scorer.info.padding == "rectangular"
    scorer.close()


def test_half_width_is_close(bert):
    batch = random_batch([3, 41, 90], vocabulary_of(bert), 1, types=True)
    expected = reference_logits(bert, batch)
    np.testing.assert_allclose(opened(bert, "fp16").score(batch), expected, atol=HALF_WIDTH)


@given(some.lists(some.integers(1, 512), min_size=1, max_size=300))
def test_shapes_are_few_and_little_larger(lengths):
    batch = random_batch(lengths, 50, 0)
    pairs, longest = rounded_shape(batch)
    assert len(batch) <= pairs <= max(1.5 * len(batch), len(batch) + 1)
    assert max(lengths) <= longest <= max(16, 1.5 * max(lengths))
    padded = pad(batch, 9, (pairs, longest))
    usual = pad(batch, 9)
    for name, array in usual.items():
        assert (padded[name][: len(batch), : max(lengths)] == array).all()
    assert (padded["input_ids"][len(batch) :] == 9).all()
    assert (padded["attention_mask"][len(batch) :].sum(1) == 1).all()
    assert padded["attention_mask"].sum() == sum(lengths) + pairs - len(batch)


def test_all_steps_up_to_a_budget_have_few_shapes():
    lengths = {rounded_shape(random_batch([n], 50, 0))[1] for n in range(1, 513)}
    assert sorted(lengths) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]


def test_an_apple_gpu_is_used_where_it_is_asked_for_only(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Options.of(device="mps").device == "mps"
    assert device.choose_device("mps") == APPLE
    assert device.choose_device("auto") == torch.device("cpu")
    assert device.candidate_precisions("mps") == ["fp32", "fp16"]
    assert [device.choose_precision(name, APPLE) for name in ("auto", "fp16")] == ["fp32", "fp16"]
    for precision in ("bf16", "int8"):
        with pytest.raises(InvalidInput, match="precision"):
            device.choose_precision(precision, APPLE)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InvalidInput, match="no Apple GPU"):
        device.choose_device("mps")


def test_a_family_that_is_not_built_for_apple_says_so():
    for family in FAMILIES:
        if family.mps_module is None:
            with pytest.raises(InvalidInput, match="not built for Apple's GPUs"):
                family.open(APPLE)
    assert [family.name for family in FAMILIES if family.mps_module] == [
        "BERT", "RoBERTa and XLM-RoBERTa",
    ]  # fmt: skip


class Counting:
    """A pass that notes how many run at once."""

    def __init__(self):
        self.now = self.most = 0
        self.barrier = threading.Barrier(2)

    def __call__(self, forward):
        self.now += 1
        self.most = max(self.most, self.now)
        with pytest.raises(threading.BrokenBarrierError):
            self.barrier.wait(0.2)  # the other thread never comes
        self.barrier.reset()
        self.now -= 1
        return np.zeros(1, np.float32)


def test_steps_on_an_apple_gpu_run_one_at_a_time(bert, monkeypatch):
    counting = Counting()
    monkeypatch.setattr(encoder_padded, "run_step", counting)
    scorers = [opened(bert) for _ in range(2)]
    for scorer in scorers:
        scorer._device = APPLE
    batch = random_batch([5], 300, 0)
    threads = [threading.Thread(target=scorer.score, args=(batch,)) for scorer in scorers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counting.most == 1


def test_the_padded_scorer_rounds_its_sizes_there_too(bert, monkeypatch):
    with pytest.warns(match="no packed encoder"):
        scorer = GenericScorer(bert, read_config(bert), torch.device("cpu"), "fp32", 1, 0)
    batch = random_batch([5, 9, 3, 17, 20], vocabulary_of(bert), 0, types=True)
    expected = scorer.score(batch)
    shapes = []
    model = scorer._model

    def watched(**inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return model(**inputs)

    scorer._model = watched
    scorer._device = Somewhere()
    real = torch.Tensor.to

    def to(tensor, *where, **more):
        return tensor if where and isinstance(where[0], Somewhere) else real(tensor, *where, **more)

    monkeypatch.setattr(torch.Tensor, "to", to)
    np.testing.assert_allclose(scorer.score(batch), expected, rtol=0, atol=EXACT)
    assert shapes == [(6, 24)]


class Somewhere:
    """A device that says that it is Apple's, and where tensors stay on the CPU."""

    type = "mps"
