"""The committed table of compiled kernels: of these sources, nothing spills, and some rows are compiled again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.gpu.aot import ARCHES, DOCS, as_markdown, source_hash
from kernels.gpu.cases import all_cases
from kernels.gpu.compile import Resources, family
from kernels.gpu.configs import Tile, load_configs, read_configs, search_space, slug, write_configs
from kernels.gpu.limits import LIMITS, blocks_at_once

TABLE = json.loads((DOCS / "gpu-kernels.json").read_text())
AGAIN = [  # few, but of each instruction set: the products that matter, and what is quick
    ("sm_80", "linear", "bf16", "decode"),
    ("sm_90", "expert_gate_up", "int4", "decode"),
    ("sm_100", "expert_down", "int8", "decode"),
    ("sm_120", "route", "float32", ""),
    ("gfx942", "cut_tiles", "", ""),
]


def test_the_table_is_of_these_sources_and_has_every_case():
    assert TABLE["source"] == source_hash(), "the kernels changed: make gpu-table"
    assert (DOCS / "gpu-kernels.md").read_text() == as_markdown(TABLE)
    for arch in ARCHES:
        cases = [(c.kernel, c.format, c.variant) for c in all_cases(load_configs("", arch))]
        rows = [row for row in TABLE["rows"] if row["arch"] == arch]
        assert [(r["kernel"], r["format"], r["variant"]) for r in rows] == cases


def test_nothing_spills_and_everything_fits():
    for row in TABLE["rows"]:
        assert row["spilled_nbytes"] == 0, row
        assert row["blocks"] >= 1, row


def test_the_variants_of_a_kernel_use_the_same_instructions():
    found: dict[tuple[str, str, str], set[tuple[str, ...]]] = {}
    for row in TABLE["rows"]:
        key = row["arch"], row["kernel"], row["format"]
        if not (row["arch"] == "gfx942" and row["format"] in ("int8", "int4")):  # exact by any
            found.setdefault(key, set()).add(tuple(row["instructions"]))
        if row["kernel"] in ("linear", "expert_gate_up", "expert_down") and row["format"] != "float32":
            assert row["instructions"], row
    assert all(len(each) == 1 for each in found.values()), found


def test_some_rows_compile_to_the_same_again(tmp_path: Path):
    rows = [r for r in TABLE["rows"] if (r["arch"], r["kernel"], r["format"], r["variant"]) in AGAIN]
    assert len(rows) == len(AGAIN)
    code = (
        "import json, sys\nfrom kernels.gpu.aot import rows_of\n"
        "print(json.dumps([row for arch, number in json.loads(sys.argv[1]) for row in rows_of(arch, [number])]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([(r["arch"], r["number"]) for r in rows])],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},  # nothing is taken from an earlier compilation
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == rows


def test_occupancy_is_bound_by_what_runs_out_first():
    limits = LIMITS["sm_90"]
    assert blocks_at_once(Resources(32, 0, 0, 4, ()), limits) == 16  # warps
    assert blocks_at_once(Resources(255, 0, 0, 4, ()), limits) == 2  # registers
    assert blocks_at_once(Resources(32, 0, 100 * 1024, 4, ()), limits) == 2  # shared memory
    assert blocks_at_once(Resources(32, 0, 228 * 1024, 4, ()), limits) == 0


def test_an_instructions_family_is_its_name_without_the_short_side():
    assert family("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16") == family(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
    )
    assert family("mma.sync.aligned.m16n8k16.row") != family("mma.sync.aligned.m16n8k8.row")


@pytest.mark.parametrize("kernel", ["linear", "expert_gate_up", "expert_down"])
def test_tuned_tiles_are_found_by_the_gpus_name_and_defaults_otherwise(tmp_path: Path, kernel: str):
    defaults = load_configs("", "sm_90")
    assert defaults.name == "sm_90"
    assert load_configs("Some GPU", "sm_75").name == "default"
    tuned = next(search_space(kernel, "int4", "decode"))
    defaults.tiles[kernel, "int4", "decode"] = tuned
    path = write_configs(defaults, "NVIDIA H100 PCIe", tmp_path)
    assert path.name == f"{slug('NVIDIA H100 PCIe')}.json" == "nvidia-h100-pcie.json"
    found = load_configs("NVIDIA H100 PCIe", "sm_90", tmp_path)
    assert found.tile(kernel, "int4", 1) == tuned
    assert found.tile(kernel, "int4", 17) == defaults.tiles[kernel, "int4", "prefill"]
    assert found.attention == defaults.attention
    assert read_configs(path).tiles == defaults.tiles


def test_every_tile_of_the_search_space_can_be_compiled_as_it_is():
    for format in ("float32", "bf16", "int8", "int4"):
        for variant in ("decode", "prefill"):
            tiles = list(search_space("expert_gate_up", format, variant))
            assert len(tiles) == len(set(tiles)) > 4
            for tile in tiles:
                assert isinstance(tile, Tile)
                assert tile.rows >= 16
                assert tile.outputs >= 64
                assert not tile.outputs & (tile.outputs - 1)
