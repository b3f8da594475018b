"""The benchmark harness itself: gate, interleaving, memory, replay, reports, and the loading of foreign files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benches import bench_contextual_attention as bench
from benches import convolution_case, gpu_convolutions, gpu_hog, harness, hog_case, peers, race_results, report
from benches.bench_contextual_attention import AttentionCase
from benches.convolution_case import (
    DEEPFILL_V2,
    GLCIC,
    NETWORKS,
    PCONV_UNET,
    PROVIDERS,
    ConvolutionCase,
    Layer,
)
from benches.harness import BFLOAT16, FLOAT32
from benches.hog_case import HogCase
from inpaint_kernels.reference import contextual_attention as reference

EXACT = (torch.arange(4.0),)


def alone() -> dict[str, str]:
    """The environment of a pytest that is no worker of this one's: benchmarks are off in workers."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def make_provider(name: str, outputs: harness.Outputs = EXACT, calls: list[str] | None = None, **options: Any):
    def run() -> harness.Outputs:
        if calls is not None:
            calls.append(name)
        return outputs

    return harness.Provider(name, run, **{"expected": lambda: EXACT, **options})


def sleeper(name: str, seconds: float, calls: list[str] | None = None) -> harness.Provider:
    def run() -> harness.Outputs:
        if calls is not None:
            calls.append(name)
        time.sleep(seconds)
        return EXACT

    return harness.Provider(name, run, lambda: EXACT)


# Races ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [torch.arange(4.0) + 1e-3, torch.full((4,), torch.nan)])
def test_a_wrong_provider_is_not_timed(wrong: Tensor) -> None:
    calls: list[str] = []
    field = [make_provider("right", calls=calls), make_provider("wrong", (wrong,), calls)]
    measurements, _ = harness.run_race(field, [1e-5], seconds=1, rounds=4)
    assert isinstance(measurements["wrong"].failure, harness.WrongResultError)
    assert "wrong: not timed" in str(measurements["wrong"].failure)
    assert measurements["wrong"].wall == []
    assert calls.count("wrong") == 1
    assert len(measurements["right"].wall) == len(measurements["right"].cpu) == 4
    assert measurements["right"].error == 0


def test_a_provider_that_raises_spoils_no_other() -> None:
    def fail() -> harness.Outputs:
        raise MemoryError("too large")

    measurements, _ = harness.run_race(
        [harness.Provider("fails", fail, lambda: EXACT), make_provider("right")], [1e-5], seconds=1, rounds=2
    )
    assert isinstance(measurements["fails"].failure, MemoryError)
    assert len(measurements["right"].wall) == 2


def test_providers_take_turns_and_the_first_rotates() -> None:
    calls: list[str] = []

    field = [sleeper("a", 0.1, calls), sleeper("b", 0.0, calls), sleeper("c", 0.1, calls)]
    measurements, noise = harness.run_race(field, [1e-5], seconds=10, rounds=3)
    # gates first; then b, the quickest, runs once more at the end of every round to show the noise
    assert "".join(calls) == "abc" + "abcb" + "bcab" + "cabb"
    assert min(measurements["a"].wall) >= 0.1 > max(measurements["a"].cpu)
    assert noise is not None
    assert noise >= 0


def test_seconds_limit_the_rounds() -> None:
    measurements, _ = harness.run_race([sleeper("sleeps", 0.01)], [1e-5], seconds=0.0)
    assert len(measurements["sleeps"].wall) == harness.MIN_ROUNDS


def test_a_sampled_yardstick_is_scaled_and_not_gated() -> None:
    yardstick = replace(sleeper("sample", 0.01), expected=None, scale=5.0)
    measurements, _ = harness.run_race([yardstick], [1e-5], seconds=1, rounds=2)
    assert min(measurements["sample"].wall) >= 0.05
    assert measurements["sample"].error is None


def test_the_gate_compares_what_was_selected() -> None:
    longer = (torch.cat((EXACT[0], torch.tensor([99.0]))),)
    field = [make_provider("selects", longer, select=lambda outputs: (outputs[0][:4],))]
    measurements, _ = harness.run_race(field, [1e-5], seconds=1, rounds=1)
    assert measurements["selects"].failure is None


def test_relative_errors_are_per_output() -> None:
    errors = harness.relative_errors(
        (torch.tensor([2.0, -4.0]), torch.ones(1)), (torch.tensor([2.0, -5.0]), torch.ones(1))
    )
    assert errors == [pytest.approx(0.2), 0.0]
    with pytest.raises(ValueError, match="outputs: expected 1 tensors, got 2"):
        harness.relative_errors((EXACT[0], EXACT[0]), EXACT)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak resident set is read from /proc")
@pytest.mark.parametrize("megabytes", [8, 64])
def test_peak_memory_sees_what_is_freed_again(megabytes: int) -> None:
    def run() -> harness.Outputs:
        return (torch.ones(megabytes * 2**18).sum(),)

    run()
    _, peak = harness.with_peak_memory(run)
    assert peak is not None
    assert megabytes - 1 <= peak / 2**20 <= megabytes + 6


class Recorder:
    """What ``benchmark.pedantic`` does with a timer."""

    def __init__(self, clock: harness.ReplayClock) -> None:
        self._clock = clock
        self.durations: list[float] = []

    def pedantic(self, target: Callable[[], None], setup: Callable[[], None], rounds: int, iterations: int) -> None:
        assert iterations == 1
        for _ in range(rounds):
            setup()
            start = self._clock()
            target()
            self.durations.append(self._clock() - start)


def test_replayed_samples_are_what_the_timer_shows() -> None:
    clock, samples = harness.ReplayClock(), [0.25, 3.0, 1e-9]
    recorder = Recorder(clock)
    clock.replay(recorder, samples)
    assert recorder.durations == samples


def test_provenance_names_no_host() -> None:
    facts = harness.provenance()
    assert facts["threads"] == torch.get_num_threads()
    assert set(facts) == {"cpu", "cores", "threads", "torch", "python", "system", "commit", "date"}


def test_the_rate_of_products_is_that_of_a_processor() -> None:
    assert 1 <= harness.matrix_gflops() < 1e6


# Cases of contextual attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_every_own_provider_passes_the_gate(direction: str) -> None:
    case = AttentionCase(16, direction, "peaked")
    own = [name for name in case.provider_names if name != bench.COMPILED]  # compiling takes too long here
    measurements, _ = harness.run_race([case.provider(name) for name in own], case.tolerances, seconds=0, rounds=1)
    assert {name: m.failure for name, m in measurements.items()} == dict.fromkeys(own)


def test_a_mistake_does_not_pass_the_gate() -> None:
    case = AttentionCase(16, "forward", "soft")
    right = case.provider(bench.OURS)
    provider = harness.Provider("shifted", lambda: (right.run()[0].roll(1, -1),), right.expected)
    measurements, _ = harness.run_race([provider], case.tolerances, seconds=0, rounds=1)
    assert isinstance(measurements["shifted"].failure, harness.WrongResultError)


def test_the_crop_gives_the_cells_of_the_whole_map() -> None:
    features, mask = bench.make_features(32, "soft").double(), bench.make_mask(32)
    box = (4, 5, 7, 9)
    cells = bench.expected_cells(features, mask, box, "nipponjo")
    whole = bench.naive_attention(features, mask)[:, :: bench.CHECKED_CHANNEL_STEP, 8:14, 10:18]
    assert cells.shape == whole.shape
    assert (cells - whole).abs().max() <= 1e-12 * whole.abs().max()


def test_the_families_differ_in_zero_probabilities() -> None:
    zeros = {}
    for family in bench.AMPLITUDE:
        features = bench.make_features(64, family)[:, :, ::2, ::2]
        _, probabilities = reference.contextual_attention(features, features, features.repeat(1, 1, 2, 2))
        zeros[family] = (probabilities == 0).float().mean().item()
    assert zeros["soft"] == 0
    assert zeros["peaked"] > 0.5


def test_the_yardstick_covers_a_sample_of_the_rows() -> None:
    rows: list[int] = []

    def gemm(x: Tensor, weight: Tensor, out: Tensor) -> None:
        assert x.shape[1] == weight.shape[1]
        rows.append(len(x))

    keys = 10 * bench.GEMM_ROWS
    run, scale = bench.bare_gemms(keys, gemm)
    run()
    assert rows == [bench.GEMM_ROWS] * 2 * (keys // bench.GEMM_KEYS + 1)  # two blocks of ten: all tiles, and the paste
    assert scale == bench.SAMPLE_EVERY == 5


def test_a_race_from_the_command_line_to_the_report(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "benches", "-q", "-p", "no:cacheprovider", "--race-rounds", "2"]
    selection = ["-k", "16x16-forward-soft and (ours or portable)", f"--benchmark-json={output}"]
    done = subprocess.run([*command, *selection], cwd=root, capture_output=True, text=True, env=alone())
    assert done.returncode == 0, done.stdout
    assert str(root) not in output.read_text()
    races = race_results.load([output])
    assert set(races["contextual_attention, 16x16-forward-soft"]) == {"ours", "portable"}
    assert len(races["contextual_attention, 16x16-forward-soft"]["ours"].entries[0].wall) == 2
    benchmarks = json.loads(output.read_text())["benchmarks"]
    assert {b["extra_info"]["figure"] for b in benchmarks} == {"seconds", "ratio to naive"}


# Cases of convolutions -----------------------------------------------------------------------------------------------

OWN_PROVIDERS = [name for name in PROVIDERS if not name.startswith(convolution_case.COMPILED)]
OF_EVERY_KIND = {
    DEEPFILL_V2: ("5to48-k5", "24to48-s2", "96to192-relu", "96to192-d16", "48to48-up", "12to3"),
    GLCIC: ("256to256-d2",),
    PCONV_UNET: ("enc1-3to64-k7-s2", "dec1-67to3"),
}
LAYERS = [
    pytest.param(network, layer, id=layer.name)
    for network, names in OF_EVERY_KIND.items()
    for layer in NETWORKS[network]
    if layer.name in names
]


@pytest.mark.parametrize(
    ("network", "convolutions", "parameters", "flops"),
    [
        (DEEPFILL_V2, 42, 4_052_478, 202e9),  # both figures as they are published
        (GLCIC, 4, 4 * (256 * 256 * 9 + 256), 77.3e9),
        (PCONV_UNET, 14, 25_770_964, 75.8e9),
    ],
)
def test_the_tables_are_the_networks(network: str, convolutions: int, parameters: int, flops: float) -> None:
    layers = NETWORKS[network]
    facts = [ConvolutionCase(network, layer, 512, FLOAT32).facts() for layer in layers]
    counts = [layer.count for layer in layers]
    weights = [x.inputs * x.outputs * x.kernel**2 + (x.outputs if x.bias else 0) for x in layers]
    assert sum(counts) == convolutions == facts[0]["convolutions"]
    assert sum(n * of_layer for n, of_layer in zip(counts, weights, strict=True)) == parameters
    assert sum(n * of_layer["flops"] for n, of_layer in zip(counts, facts, strict=True)) == pytest.approx(
        flops, rel=0.01
    )
    assert len({layer.name for layer in layers}) == len(layers)


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(("network", "layer"), LAYERS)
def test_every_provider_of_a_layer_is_right(network: str, layer: Layer, precision: str) -> None:
    case = ConvolutionCase(network, layer, 32, precision)
    for name in [*OWN_PROVIDERS, convolution_case.PORTABLE]:
        outputs = case.provider(name).run()
        errors = harness.relative_errors(convolution_case.gated_rows(case, outputs), convolution_case.expected(case))
        assert all(error <= most for error, most in zip(errors, case.tolerances, strict=True)), name
        layout = torch.channels_last if name.endswith(convolution_case.CHANNELS_LAST) else torch.contiguous_format
        assert outputs[0].is_contiguous(memory_format=layout), name
        assert outputs[0].dtype == case.dtype


@pytest.mark.parametrize(("network", "layer"), LAYERS)
def test_the_compared_rows_are_those_of_the_whole(network: str, layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ConvolutionCase(network, layer, 96, FLOAT32)
    inputs = convolution_case.in_float64(convolution_case.make_inputs(case, channels_last=False))
    whole = convolution_case.our_op(layer, "reference", inputs)
    monkeypatch.setattr(convolution_case, "LARGEST_FULLY_GATED_SIZE", 0)
    monkeypatch.setattr(convolution_case, "GATED_ROWS", 2)
    strips = convolution_case.expected.__wrapped__(case)
    assert strips[0].shape[2] == 6 < case.output_side == whole[0].shape[2]
    for strip, rows in zip(strips, convolution_case.gated_rows(case, whole), strict=True):
        assert torch.allclose(strip, rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_mistaken_layer_does_not_pass_the_gate(network: str) -> None:
    case = ConvolutionCase(network, NETWORKS[network][0], 32, BFLOAT16)
    right = case.provider("ours")
    provider = harness.Provider("shifted", lambda: tuple(x.roll(1, -1) for x in right.run()), right.expected)
    measurements, _ = harness.run_race([provider], case.tolerances, seconds=0, rounds=1)
    assert isinstance(measurements["shifted"].failure, harness.WrongResultError)


def test_a_layer_from_the_command_line_to_the_report(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "benches/bench_gated_conv2d.py", "-q", "-p", "no:cacheprovider"]
    selection = ["-k", "seconds and 256-float32-12to3 and not compile", "--race-rounds", "2"]
    done = subprocess.run(
        [*command, *selection, f"--benchmark-json={output}"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        env=alone(),
    )
    assert done.returncode == 0, done.stdout
    (layers,) = report.networks(race_results.load([output]))
    assert set(layers[0]) == {"eager", "ours"}
    assert [entry.provider for entry in layers[0]["ours"].entries] == ["ours", "ours channels_last"]
    assert "2 of 42 convolutions, 256x256, float32" in report.full_tables(race_results.load([output]))


@pytest.mark.slow
def test_a_compiled_layer_is_compiled_once_per_layout() -> None:
    case = ConvolutionCase(DEEPFILL_V2, NETWORKS[DEEPFILL_V2][0], 16, FLOAT32)
    field = [case.provider(name) for name in PROVIDERS if name.startswith(convolution_case.COMPILED)]
    torch._dynamo.utils.counters.clear()
    measurements, _ = harness.run_race(field, case.tolerances, seconds=0, rounds=3)
    assert {name: m.failure for name, m in measurements.items()} == dict.fromkeys(measurements)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


# Convolutions on a GPU -----------------------------------------------------------------------------------------------


def test_gpu_convolutions_are_all_layers_in_all_precisions() -> None:
    cases = gpu_convolutions.cases()
    assert len({(case.network, str(case)) for case in cases}) == len(cases) == 3 * sum(map(len, NETWORKS.values()))
    assert {case.device for case in cases} == {"cuda"}
    for case in cases:
        facts = case.facts()
        assert facts["our_flops"] >= facts["flops"]
        assert facts["our_bytes"] >= facts["bytes"]
        assert facts["our_flops"] < 8 * facts["flops"]  # 3 output channels take a tile of 16
        assert case.is_dilated == ("eager deterministic" in case.provider_names)


def test_settings_of_a_gpu_case_hold_during_its_calls_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn: Any = torch.backends.cudnn
    seen = []

    def forward(inputs: convolution_case.Inputs) -> harness.Outputs:
        seen.append((cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32))
        return EXACT

    case = gpu_convolutions.GpuConvolutionCase(GLCIC, NETWORKS[GLCIC][0], 32, "tf32", device="cpu")
    monkeypatch.setattr(ConvolutionCase, "forward", lambda self, name: forward)
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32
    for name in ("eager", "eager deterministic channels_last"):
        case.provider(name).run()
    assert seen == [(False, True, True), (True, False, True)]
    assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32) == before


@pytest.mark.parametrize(("name", "inside"), [("ours in GEMM", True), ("ours behind cuDNN", False)])
def test_a_way_is_forced_during_the_call_only(name: str, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from inpaint_kernels.triton_kernels import dilated_conv2d as module

    rule, seen = module.in_gemm, []

    def forward(inputs: convolution_case.Inputs) -> harness.Outputs:
        seen.append(module.in_gemm(*[None] * 2)[0])  # type: ignore[arg-type]
        return EXACT

    case = gpu_convolutions.GpuConvolutionCase(GLCIC, NETWORKS[GLCIC][0], 32, FLOAT32, device="cpu")
    monkeypatch.setattr(ConvolutionCase, "forward", lambda self, name: forward)
    case.provider(f"{name} channels_last").run()
    assert seen == [inside]
    assert module.in_gemm is rule


# Cases of hog --------------------------------------------------------------------------------------------------------

HOG_CASES = [HogCase(50, 1), HogCase(50, 3, visualize=True), HogCase(43, 3, "float32"), HogCase(32, 3, batch=3)]


@pytest.mark.parametrize("case", HOG_CASES, ids=str)
def test_every_provider_of_hog_passes_the_gate(case: HogCase) -> None:
    names = [name for name in case.provider_names if name != hog_case.COMPILED]  # compiling takes too long here
    assert hog_case.SKIMAGE in names
    measurements, _ = harness.run_race([case.provider(name) for name in names], case.tolerances, seconds=0, rounds=1)
    assert {name: m.failure for name, m in measurements.items()} == dict.fromkeys(names)
    assert measurements[hog_case.OURS].error is not None


@pytest.mark.parametrize("case", HOG_CASES[:2], ids=str)
def test_a_gradient_in_another_bin_does_not_pass_the_gate(case: HogCase) -> None:
    right = case.provider("ours")
    turned = harness.Provider("turned", lambda: tuple(x.roll(1, -1) for x in right.run()), right.expected)
    measurements, _ = harness.run_race([turned], case.tolerances, seconds=0, rounds=1)
    assert isinstance(measurements["turned"].failure, harness.WrongResultError)


def test_the_copy_moves_the_bytes_of_an_image_and_its_features() -> None:
    case = HogCase(2000, 1)
    blocks = 248 * 248
    assert case.facts()["bytes"] == 2000 * 2000 + 4 * blocks * 81
    assert case.provider_names[-1] == hog_case.COPY
    (copied,) = case.provider(hog_case.COPY).run()
    assert 2 * copied.numel() == case.facts()["bytes"]
    assert hog_case.COPY not in HogCase(512, 1).provider_names


def test_gpu_cases_of_hog_plan_more_than_the_least() -> None:
    cases = gpu_hog.cases()
    assert len(set(map(str, cases))) == len(cases)
    for case in cases:
        facts = case.facts()
        assert (facts["op"], facts["precision"]) == ("hog", "float32")
        assert facts["our_flops"] > facts["flops"]
        assert facts["bytes"] < facts["our_bytes"] < 1.3 * facts["bytes"]
    most_wanted = dict(cases[0].facts())
    assert report.prediction(most_wanted, report.H200_DATASHEET) < 60e-6  # what the kernels were made for
    table = report._gpu_times([most_wanted], None)
    assert "| hog, 2000x2000 rgb float32 | 14.2 us |" in table


# Report --------------------------------------------------------------------------------------------------------------


def stored(case: str, provider: str, wall: list[float], **facts: Any) -> dict[str, Any]:
    info = {
        "provider": provider,
        "figure": "seconds",
        "cpu_seconds": [2 * seconds for seconds in wall],
        "peak_extra_mib": 100.0,
        "largest_relative_error": 1e-6,
        "noise": 0.02,
        "op": "contextual_attention",
        "case": case,
        "size": 128,
        "keys": 4096,
        "queries": 4096,
        "direction": "forward",
        "family": "peaked",
        "channels": 128,
        "provenance": {"cpu": "A CPU", "threads": 2, "torch": "2.13", "commit": "abc", "date": "2026-01-02 03:04 UTC"},
    }
    return {"extra_info": {**info, **facts}, "stats": {"data": wall}}


def test_tables_tell_how_quick_the_cpu_was(tmp_path: Path) -> None:
    races = []
    for case, rate in (("small", 174), ("big", 141)):
        entry = stored(case, "ours", [1.0])
        entry["extra_info"]["provenance"] = {**entry["extra_info"]["provenance"], "matrix_gflops": rate}
        races.append(entry)
    file = tmp_path / "races.json"
    for count, told in ((2, "made 141 to 174 GFLOP/s"), (1, "made 174 GFLOP/s"), (0, None)):
        benchmarks = races[:count] or [stored("small", "ours", [1.0])]
        file.write_text(json.dumps({"datetime": "2026-01-01", "benchmarks": benchmarks}))
        line = race_results.provenance_line(race_results.load([file]))
        assert told in line if told else "GFLOP/s" not in line


@pytest.fixture
def results(tmp_path: Path) -> Path:
    race = [
        stored("big", "naive", [4.0, 8.0, 4.0], peak_extra_mib=2048.0),
        stored("big", "ours", [1.0, 2.0, 0.5]),
        stored("big", "daa233", [10.0, 10.0, 10.0]),
        stored("big", "daa233 channels_last", [9.0, 9.0, 9.0]),
        stored("small", "ours", [0.002], keys=64, queries=64, size=16),
        stored("small", "naive", [0.001], keys=64, queries=64, size=16),
        stored("other", "ours", [1.0], op="another op"),
        stored("other", "naive", [0.001], op="another op"),
        {"extra_info": {"figure": "ratio to naive"}, "stats": {"data": [1.0]}},
        {"extra_info": {}, "stats": {"data": [1.0]}},
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"datetime": "2026-01-02", "benchmarks": race}))
    return path


def test_ratios_are_taken_within_rounds(results: Path) -> None:
    races = race_results.load([results])
    assert (
        races["contextual_attention, big"]["naive"].times_slower_than(races["contextual_attention, big"]["ours"]) == 4.0
    )
    assert races["contextual_attention, big"]["daa233"].wall == 9.0


def test_the_summary_has_the_row_where_we_lose(results: Path) -> None:
    big, worst = report.summary(race_results.load([results])).splitlines()[2:4]
    assert big == (
        "| 512x512 image, 4,096 keys, forward | 4 s | 9 s | **1 s** | 4.0x / 9.0x | 2.00 GiB / 100 MiB / 100 MiB |"
    )
    assert worst.startswith("| where we lose: 64x64 image, 64 keys, forward against naive (1 ms) |")
    assert "0.5x" in worst


def test_a_newer_race_replaces_an_older_one(results: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer.json"
    newer.write_text(json.dumps({"datetime": "2026-02-01", "benchmarks": [stored("big", "ours", [0.1])]}))
    races = race_results.load([newer, results])
    assert list(races["contextual_attention, big"]) == ["ours"]
    assert races["contextual_attention, big"]["ours"].wall == 0.1
    assert set(races["contextual_attention, small"]) == {"ours", "naive"}


def test_full_tables_show_every_committed_race():
    races = race_results.load(sorted(report.RESULTS.glob("*.json")))
    tables = report.full_tables(races)
    alone = [case for case, contenders in races.items() if not report._is_layer(contenders)]
    assert all(f"### {case}\n" in tables for case in alone)


def test_full_tables_show_every_provider(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(results)])
    printed = capsys.readouterr().out
    assert "### contextual_attention, big" in printed
    assert "| daa233 | 9 s | 18 s | 100 MiB | 1e-06 | 9.00x |" in printed
    assert "A CPU, 2 threads, torch 2.13, commit abc, 2026-01-02" in printed


def test_update_keeps_the_rest_of_the_file(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main([str(results), "--update", str(readme)])
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n| contextual attention")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    report.main([str(results), "--update", str(readme)])
    assert readme.read_text() == text


@pytest.mark.parametrize("document", ["none", f"{report.END}{report.BEGIN}", f"{report.BEGIN * 2}{report.END}"])
def test_update_needs_its_markers(document: str) -> None:
    with pytest.raises(ValueError, match="expected one line '<!-- benchmarks: begin -->'"):
        report.update_between_markers(document, "text")


def test_plot_and_missing_results(results: Path, tmp_path: Path) -> None:
    report.main([str(results), "--plot", str(tmp_path / "times.png")])
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"datetime": "2026-01-01", "benchmarks": []}))
    with pytest.raises(SystemExit, match="no results in"):
        report.main([str(empty)])


def stored_layer(name: str, count: int, provider: str, wall: list[float], **facts: Any) -> dict[str, Any]:
    of_layer: dict[str, Any] = {
        "op": "gated_conv2d",
        "network": "a network",
        "convolutions": 3,
        "layer": name,
        "count": count,
        "size": 512,
        "precision": "bfloat16",
    }
    return stored(f"512-bfloat16-{name}", provider, wall, **of_layer, **facts)


@pytest.fixture
def network_results(tmp_path: Path) -> Path:
    """Two layers: the first, which occurs twice, is quicker in NCHW, the second in channels_last."""
    race = [
        stored_layer("a", 2, "eager", [0.2, 0.3, 0.2]),
        stored_layer("a", 2, "eager channels_last", [0.3, 0.3, 0.3]),
        stored_layer("a", 2, "torch.compile channels_last", [0.1, 0.1, 0.1], peak_extra_mib=300.0),
        stored_layer("a", 2, "ours", [0.2, 0.2, 0.2]),
        stored_layer("a", 2, "ours channels_last", [0.125, 0.125, 0.125], peak_extra_mib=50.0),
        stored_layer("b", 1, "eager", [1.0, 1.0, 1.0], peak_extra_mib=500.0),
        stored_layer("b", 1, "eager channels_last", [0.6, 0.6, 0.6], peak_extra_mib=400.0),
        stored_layer("b", 1, "torch.compile channels_last", [0.5, 0.5, 0.5]),
        stored_layer("b", 1, "ours", [0.2, 0.2, 0.2]),
        stored_layer("b", 1, "ours channels_last", [0.25, 0.25, 0.25]),
    ]
    path = tmp_path / "network.json"
    path.write_text(json.dumps({"datetime": "2026-01-03", "benchmarks": race}))
    return path


def test_a_network_is_summed_in_one_layout(network_results: Path) -> None:
    """Published code: 2 x 0.2 + 1 or 2 x 0.3 + 0.6; ours 2 x 0.2 + 0.2 or 2 x 0.125 + 0.25, not 2 x 0.125 + 0.2."""
    (layers,) = report.networks(race_results.load([network_results]))
    assert report.network_seconds(layers, "eager") == pytest.approx(1.2)
    assert report.network_seconds(layers, "torch.compile") == pytest.approx(0.7)
    assert report.network_seconds(layers, "ours") == pytest.approx(0.5)
    assert report.network_seconds(layers, "absent") is None
    assert report.network_seconds([*layers, {"ours": layers[0]["ours"]}], "eager") is None


def test_the_summary_of_a_network_names_its_worst_layer(network_results: Path) -> None:
    row = report.summary(race_results.load([network_results])).splitlines()[2]
    assert row == (
        "| a network, 3 convolutions, 512x512, bfloat16 | 1.2 s | 700 ms | **500 ms** | 2.40x / 1.40x | 0.80x (a) | "
        "400 MiB / 300 MiB / 100 MiB |"
    )


def test_the_summary_has_both_tables(results: Path, network_results: Path) -> None:
    text = report.summary(race_results.load([results, network_results]))
    assert text.startswith("| contextual attention")
    assert "\n\n| convolutions of a network |" in text
    assert "interleaved rounds, float32." in text
    assert "interleaved rounds, bfloat16." in text


def test_layers_are_rows_of_one_table(network_results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(network_results)])
    lines = capsys.readouterr().out.splitlines()
    assert "### a network, 3 convolutions, 512x512, bfloat16" in lines
    times = "200 ms | 300 ms | 100 ms | 200 ms | 125 ms | 1.60x | 0.80x"
    assert f"| a | 2 | {times} | 100 MiB / 300 MiB / 50 MiB | 1e-06 | 2% |" in lines
    assert "| all | 3 | 1.4 s | 1.2 s | 700 ms | 600 ms | 500 ms | 2.40x | 1.40x |  |  |  |" in lines


def test_a_network_on_a_gpu_is_one_row(tmp_path: Path) -> None:
    cases = [dict(case.facts()) for case in gpu_convolutions.cases() if case.network == GLCIC]
    table = report._gpu_times(cases, None)
    assert table.count("| GLCIC dilated layers, 4 convolutions, 2000x2000 image,") == 3
    floors = [report.floor(facts, report.H200_DATASHEET) for facts in cases if facts["precision"] == "tf32"]
    assert f"image, tf32 | {1e3 * sum(floors):.3g} ms |" in table


def test_hog_has_a_table_of_its_own(results: Path, tmp_path: Path) -> None:
    def stored_hog(provider: str, wall: list[float], **facts: Any) -> dict[str, Any]:
        of_case = {"op": "hog", "size": 2000, "batch": 1, "channels": 1, "precision": "uint8", "opencv": "4.1.2"}
        return stored("2000x2000-gray-uint8", provider, wall, **of_case, **facts)

    race = [
        stored_hog("scikit-image", [0.9, 0.8, 1.0]),
        stored_hog("eager", [0.4, 0.4, 0.4]),
        stored_hog("torch.compile", [0.2, 0.2, 0.2]),
        stored_hog("ours", [0.002, 0.002, 0.0025]),
        stored_hog("OpenCV 4", [0.05, 0.05, 0.05], largest_relative_error=None),
        stored_hog("copy of the bytes", [0.001, 0.001, 0.001], largest_relative_error=None),
    ]
    path = tmp_path / "hog.json"
    path.write_text(json.dumps({"datetime": "2026-01-04", "benchmarks": race}))
    races = race_results.load([path])
    header, _, row, _, note = report.hog_summary(races).splitlines()
    assert header.startswith("| hog | scikit-image |")
    assert row == (
        "| 2000x2000 gray uint8 | 900 ms | 400 ms | 200 ms | 50 ms | - | **2 ms** | 400x / 100x / 25x | 1 ms |"
    )
    assert "OpenCV 4 is 4.1.2" in note
    assert report.hog_summary(race_results.load([results])) == ""
    assert "hog" not in report.summary(race_results.load([path, results]))
    assert "1 x 2000 x 2000 pixels, 1 channels; noise 2%." in report.full_tables(races)
    readme = tmp_path / "README.md"
    readme.write_text("".join(f"{line}\n" for line in (report.BEGIN, report.END, report.HOG_BEGIN, report.HOG_END)))
    report.main([str(path), str(results), "--update", str(readme)])
    assert row in readme.read_text()


# Foreign files -------------------------------------------------------------------------------------------------------


def test_a_foreign_file_is_imported_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("from absent_package.layers import Conv2d\nNAME = 'theirs'\n")
    (tmp_path / "layer.py").write_text(
        "from utils import NAME, Conv2d\nfrom absent_package import transforms\nclass Layer(Conv2d):\n    pass\n"
    )
    modules, path, finders = dict(sys.modules), list(sys.path), list(sys.meta_path)
    module = peers.import_file(tmp_path, "layer.py", stand_ins=("absent_package",))
    assert module.NAME == "theirs"
    assert issubclass(module.Layer, torch.nn.Module)
    assert (sys.path, sys.meta_path) == (path, finders)
    assert set(sys.modules) == set(modules)


def test_ports_are_found_by_either_folder_name(tmp_path: Path) -> None:
    assert peers.available_ports(None) == {}
    assert peers.available_ports(tmp_path) == {}
    (tmp_path / "mmagic").mkdir()
    (tmp_path / "nipponjo+deepfillv2-pytorch").mkdir()
    assert set(peers.available_ports(tmp_path)) == {"mmagic", "nipponjo", "nipponjo_tf"}
    with pytest.raises(ValueError, match="is not a folder"):
        peers.available_ports(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="daa233/generative-inpainting-pytorch: no checkout"):
        peers.load_port(peers.PORTS[0], tmp_path)


def test_an_adapter_follows_the_inputs_dtype_and_device(tmp_path: Path) -> None:
    (tmp_path / "selflein+DeepFill-v2" / "iminpaint" / "model_parts").mkdir(parents=True)
    folder = tmp_path / "selflein+DeepFill-v2" / "iminpaint" / "model_parts"
    (folder / "gated_convolution.py").write_text("GatedConv = None\n")
    (folder / "encoder_decoder.py").write_text(
        "import torch\n"
        "from iminpaint.model_parts.gated_convolution import GatedConv\n"
        "class ContextualAttention(torch.nn.Module):\n"
        "    def __init__(self, use_attention_propagation):\n"
        "        super().__init__()\n"
        "    def forward(self, f, b, mask):\n"
        "        return f @ torch.eye(f.shape[-1]).cuda() + mask\n"
    )
    port = next(port for port in peers.PORTS if port.name == "selflein")
    attention = peers.load_port(port, tmp_path)
    f = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    assert torch.equal(attention(f, f, None), f)
    assert torch.get_default_dtype() == torch.float32
