"""The tensor reader, the layout of shards, and the figures: by hand, and against safetensors."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

from harness.merging.differences import Sums, gathered, place_of, sums_of
from harness.merging.write import Shards, TensorShape
from harness.models.tensors import TensorFolder, mapped, not_finite, read_header


def test_every_type_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    """Also empty ones, scalars, and what a file lays at odd addresses."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "single": torch.randn(2, 1, 3),
        "double": torch.randn(4).double(),
        "long": torch.tensor([[-1, 2**40]]),
        "truth": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "plain.safetensors")
    # safetensors sorts by size of type; here everything stands one byte off.
    parts, header, end = [b"\1"], {"first": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, 1
    names = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    names |= {torch.float64: "F64", torch.int64: "I64", torch.bool: "BOOL"}
    for name, tensor in tensors.items():
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(data)],
        }
        parts.append(data)
        end += len(data)
    text = json.dumps(header).encode()
    (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
    for file in ("plain.safetensors", "odd.safetensors"):
        folder = TensorFolder([tmp_path / file], "it")
        expected = load_file(tmp_path / file)
        assert folder.names == sorted(expected)
        for name, tensor in expected.items():
            found = folder.read(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(found, tensor)


def test_nothing_done_to_a_tensor_reaches_the_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"t": torch.ones(5000)}, tmp_path / "f.safetensors")
    before = (tmp_path / "f.safetensors").read_bytes()
    found = mapped(read_header(tmp_path / "f.safetensors")["t"])
    found.fill_(7)
    assert (tmp_path / "f.safetensors").read_bytes() == before


def test_pickled_tensors_only_with_leave(made: Path, tmp_path: Path) -> None:
    import shutil

    import torch

    import harness
    from harness.core.specs import ModelSpec
    from tests.merging.conftest import tensor_bytes, weights

    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    torch.save(weights(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(harness.UserError, match="unpickling can run any code"):
        harness.merge("dare_ties", [made / "a0"], base=base, out=tmp_path / "out")
    trusted = ModelSpec(model=str(base), allow_pickle=True)
    # The digest of the weights is another, and the adapter's folder says only a name.
    harness.merge("dare_ties", [made / "a0"], base=trusted, out=tmp_path / "out")
    harness.merge("dare_ties", [made / "a0"], base=made / "base", out=tmp_path / "plain")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "plain")


def test_what_is_not_finite() -> None:
    import torch

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        plain = torch.zeros(1000, dtype=dtype)
        assert not_finite(plain) == ""
        for value, word in ((math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")):
            tensor = plain.clone()
            tensor[777] = value
            assert not_finite(tensor) == word
    assert not_finite(torch.tensor([1, 2])) == ""
    assert not_finite(torch.empty(0)) == ""


def test_shards_are_laid_out_and_filled_in_any_order(tmp_path: Path) -> None:
    """Files of at most 40 bytes: 24 + 16, then 8 + 20 (the next would make 44), then 100 alone, then 16."""
    import torch
    from safetensors.torch import load_file

    sizes = {"a": 6, "b": 4, "c": 2, "d": 5, "größer": 25, "f": 4}
    plans = [TensorShape(name, "F32", (count,)) for name, count in sizes.items()]
    assert [plan.size for plan in plans] == [24, 16, 8, 20, 100, 16]
    shards = Shards(tmp_path, plans, 40)
    assert shards.files == [f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    for name in ("f", "größer", "a", "d", "b"):
        shards.write(name, torch.full((sizes[name],), float(sizes[name])))
    with pytest.raises(RuntimeError, match="missing"):
        shards.finish()
    with pytest.raises(ValueError, match="was not planned"):
        shards.write("c", torch.zeros(3))
    shards.write("c", torch.full((2,), 2.0))
    written = shards.finish()
    assert set(written) == set(shards.files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 184
    files = {name: int(file[8:11]) for name, file in index["weight_map"].items()}
    assert files == {"a": 1, "b": 1, "c": 2, "d": 2, "größer": 3, "f": 4}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], torch.full((sizes[name],), float(sizes[name])))


def test_figures_by_hand() -> None:
    """W = (3, 4), d1 = (1, 0), d2 = (1, -1), d = (2, -1): norms 1, sqrt 2, sqrt 5 over 5; cosine 1 / sqrt 2."""
    import torch

    base, first, second = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, -1.0])
    result = torch.tensor([2.0, -1.0])
    for deltas in (True, False):
        shift = 0 if deltas else base
        values = [first + shift, second + shift]
        found = sums_of(values, base, result + shift, deltas=deltas, extra={"kept": 0.5}).figures()
        assert found["entries"] == 2
        assert found["delta_norm"] == pytest.approx([1 / 5, math.sqrt(2) / 5])
        assert found["cosine"] == {"1-2": pytest.approx(1 / math.sqrt(2))}
        assert found["sign_conflict"] == 0
        assert found["result_delta_norm"] == pytest.approx(math.sqrt(5) / 5)
        # (5, 3) against (3, 4)
        assert found["norm_ratio"] == pytest.approx(math.sqrt(34) / 5)
        assert found["merger"] == {"kept": 0.5}


def test_sign_conflicts_count_what_is_changed() -> None:
    """Of five entries four are changed; two pull apart in the second and the fourth."""
    import torch

    first = torch.tensor([1.0, 1.0, 0.0, -1.0, 0.0])
    second = torch.tensor([2.0, -1.0, 3.0, 0.5, 0.0])
    third = torch.tensor([0.0, 0.0, 1.0, -2.0, 0.0])
    zero = torch.zeros(5)
    found = sums_of([first, second, third], zero + 1, zero, deltas=True, extra={}).figures()
    assert found["sign_conflict"] == 2 / 4
    assert found["result_delta_norm"] == 0


def test_long_tensors_are_looked_at_in_pieces() -> None:
    """Longer than a piece, and no multiple of it; numpy in double precision is the measure."""
    import numpy as np
    import torch

    draw = torch.Generator().manual_seed(0)
    base, first, second = (torch.randn(300_001, generator=draw) for _ in range(3))
    found = sums_of([first, second], base, first + second, deltas=True, extra={}).figures()
    b, f, s = (one.numpy().astype(np.float64) for one in (base, first, second))
    norms = [np.linalg.norm(f) / np.linalg.norm(b), np.linalg.norm(s) / np.linalg.norm(b)]
    assert found["delta_norm"] == pytest.approx(norms, rel=1e-5)
    cosine = (f @ s) / np.linalg.norm(f) / np.linalg.norm(s)
    assert found["cosine"]["1-2"] == pytest.approx(cosine, abs=1e-6)
    assert found["sign_conflict"] == pytest.approx(((f * s) < 0).mean(), abs=1e-9)


def test_layers_and_total_are_of_all_entries_together() -> None:
    """Two tensors of one layer, norms 3 and 4 over bases 5 and 12: 5 / 13, not a mean of 3/5 and 1/3."""
    rows = []
    for name, delta, base in (("m.layers.2.a.weight", 9.0, 25.0), ("m.layers.2.b.weight", 16.0, 144.0)):
        sums = Sums(1, entries=1, base=base, delta=delta, result=base, dots=[[delta]])
        sums.extra["angle"].append((delta, 1))
        rows.append((name, sums))
    rows.append(("head.weight", Sums(1, entries=2)))
    found = gathered(1, rows)
    assert [row["module"] for row in found["tensors"]] == ["a", "b", "head"]
    assert [row["layer"] for row in found["layers"]] == [2, None]
    assert found["layers"][0]["delta_norm"] == [pytest.approx(5 / 13)]
    assert found["layers"][0]["merger"] == {"angle": pytest.approx(12.5)}
    assert found["layers"][1]["delta_norm"] == [None]
    assert found["total"]["delta_norm"] == [pytest.approx(5 / 13)]
    assert found["total"]["entries"] == 4
    json.dumps(found, allow_nan=False)


def test_a_model_without_a_part_in_a_slice_has_no_figures_there() -> None:
    """Of three inputs only the third and the base (which changes nothing) are in this tensor."""
    sums = Sums(2, entries=4, base=4.0, dots=[[9.0, 0.0], [0.0, 0.0]]).placed([2, -1], 3)
    assert sums.dots == [[0, 0, 0], [0, 0, 0], [0, 0, 9.0]]
    total = Sums(3)
    total.add(sums)
    assert total.figures()["delta_norm"] == [0, 0, 1.5]


def test_places() -> None:
    assert place_of("model.layers.13.mlp.up_proj.weight") == (13, "mlp.up_proj")
    assert place_of("transformer.h.0.attn.c_attn.bias") == (0, "attn.c_attn.bias")
    assert place_of("lm_head.weight") == (None, "lm_head")
