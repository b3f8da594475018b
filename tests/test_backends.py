"""The choice of a backend: precedence, reasons, errors, warnings, threads, cost, torch.compile."""

from __future__ import annotations

import dataclasses
import threading
import timeit
import warnings

import pytest
import torch

from inpaint_kernels import _backends
from inpaint_kernels._backends import BackendError, OpBackends, explain, use_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@dataclasses.dataclass
class Problem:
    device: torch.device
    size: int


def prepare(x, device=CPU):
    return Problem(device, x.shape[0])


def cpu_reasons(problem):
    reasons = [] if problem.device.type == "cpu" else [f"the tensors are on {problem.device}"]
    if problem.size > 4:
        reasons.append(f"{problem.size} rows, at most 4 are supported")
    return reasons


@pytest.fixture
def op(monkeypatch):
    """A table with a cpu kernel for up to four rows, a portable one for anything, and a reference on request."""
    monkeypatch.setattr(_backends, "_ops", {})
    monkeypatch.setattr(_backends, "_warned", set())
    monkeypatch.setattr(_backends, "_environment_request", "auto")
    return OpBackends(
        "toy", prepare, {"cpu": cpu_reasons, "portable": lambda problem: [], "reference": lambda problem: ["too slow"]}
    )


def test_automatic_choice_takes_the_first_that_can(op):
    assert op.choose(Problem(CPU, 4)) == "cpu"
    assert op.choose(Problem(CPU, 5)) == "portable"
    assert op.choose(Problem(CPU, 4), "auto") == "cpu"


def test_argument_before_context_before_environment(op, monkeypatch):
    problem = Problem(CPU, 1)
    monkeypatch.setattr(_backends, "_environment_request", "portable")
    assert op.choose(problem) == "portable"
    with use_backend("cpu"):
        assert op.choose(problem) == "cpu"
        assert op.choose(problem, "portable") == "portable"
        with use_backend("portable"):
            assert op.choose(problem) == "portable"
        assert op.choose(problem) == "cpu"
    with use_backend("auto"):
        assert op.choose(problem) == "cpu"
    assert op.choose(problem) == "portable"


def test_context_for_one_op_leaves_the_others(op):
    other = OpBackends("other", prepare, {"cpu": cpu_reasons, "portable": lambda problem: []})
    with use_backend("portable", op="toy"):
        assert op.choose(Problem(CPU, 1)) == "portable"
        assert other.choose(Problem(CPU, 1)) == "cpu"
        with use_backend("cpu"):
            assert op.choose(Problem(CPU, 1)) == "cpu"


def test_request_that_cannot_run_raises_with_the_reasons(op):
    with pytest.raises(BackendError, match=r"toy: backend 'cpu' was requested and cannot run: 9 rows, at most 4"):
        op.choose(Problem(CPU, 9), "cpu")
    with (
        use_backend("cuda"),
        pytest.raises(BackendError, match="toy has no cuda kernel, only cpu, portable, reference"),
    ):
        op.choose(Problem(CPU, 1))
    assert issubclass(BackendError, RuntimeError)


def test_unknown_names_are_value_errors(op):
    names = "'auto', 'cpu', 'cuda', 'triton', 'portable', 'reference'"
    with pytest.raises(ValueError, match=f"^backend: expected one of {names}, got 'gpu'$"):
        op.choose(Problem(CPU, 1), "gpu")
    with pytest.raises(ValueError, match="backend: expected one of"), use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match=r"^op: expected one of 'toy', got 'tyo'$"), use_backend("cpu", op="tyo"):
        pass
    with pytest.raises(ValueError, match="op: expected one of 'toy'"):
        explain("tyo")
    with pytest.raises(ValueError, match="backend: expected one of"):
        explain("toy", torch.zeros(1), backend="gpu")


def test_no_backend_at_all_raises_with_all_reasons(op):
    none = OpBackends("none", prepare, {"cpu": cpu_reasons, "reference": lambda problem: ["too slow"]})
    with pytest.raises(BackendError, match=r"(?s)no backend can run this:.*cpu: 9 rows.*reference: too slow"):
        none.choose(Problem(CPU, 9))


def test_tables_are_checked(op):
    with pytest.raises(ValueError, match="got \\['gpu'\\]"):
        OpBackends("new", prepare, {"gpu": cpu_reasons})
    with pytest.raises(ValueError, match="'toy' has its backends already"):
        OpBackends("toy", prepare, {"cpu": cpu_reasons})


def test_cuda_without_a_kernel_warns_once_with_the_reasons(op):
    with pytest.warns(RuntimeWarning, match=r"(?s)toy: no kernel .* 'portable' .*cpu: the tensors are on cuda"):
        assert op.choose(Problem(CUDA, 1)) == "portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op.choose(Problem(CUDA, 1)) == "portable"


def test_asked_for_portable_on_cuda_does_not_warn(op):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op.choose(Problem(CUDA, 1), "portable") == "portable"
        assert op.choose(Problem(CPU, 9)) == "portable"


def test_explain_tells_all_without_choosing(op):
    explanation = explain("toy", torch.zeros(9), device=CUDA)
    assert (explanation.chosen, explanation.usable, explanation.requested) == ("portable", ("portable",), "auto")
    assert explanation.cannot["cpu"] == ("the tensors are on cuda", "9 rows, at most 4 are supported")
    assert str(explanation) == (
        "toy: chosen portable (requested: auto)\n"
        "  usable: portable\n"
        "  cannot: cpu: the tensors are on cuda; 9 rows, at most 4 are supported\n"
        "  cannot: reference: too slow"
    )


def test_explain_a_request_that_cannot_be_met(op):
    with use_backend("triton"):
        explanation = explain("toy", torch.zeros(1))
    assert (explanation.chosen, explanation.usable) == (None, ("cpu", "portable"))
    assert "chosen none (requested: triton)" in str(explanation)
    assert explanation.cannot["triton"] == ("toy has no triton kernel, only cpu, portable, reference",)
    assert explain("toy", torch.zeros(1), backend="portable").chosen == "portable"


def test_context_is_seen_by_its_own_thread_only(op):
    inside, leave = threading.Event(), threading.Event()
    seen = []

    def worker():
        with use_backend("portable"):
            inside.set()
            leave.wait(10)
            seen.append(op.choose(Problem(CPU, 1)))

    thread = threading.Thread(target=worker)
    thread.start()
    assert inside.wait(10)
    assert op.choose(Problem(CPU, 1)) == "cpu"
    with use_backend("reference", op="toy"), pytest.raises(BackendError):
        op.choose(Problem(CPU, 1))
    leave.set()
    thread.join()
    assert seen == ["portable"]
    assert _backends._scopes == ()


def test_context_is_left_after_an_error(op):
    with pytest.raises(KeyError), use_backend("portable"):
        raise KeyError
    assert op.choose(Problem(CPU, 1)) == "cpu"


@pytest.mark.parametrize(("value", "request_in_force"), [(None, "auto"), ("", "auto"), ("portable", "portable")])
def test_environment_variable(monkeypatch, value, request_in_force):
    monkeypatch.delenv("INPAINT_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("INPAINT_BACKEND", value)
    assert _backends._read_environment() == request_in_force


def test_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv("INPAINT_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"^INPAINT_BACKEND: expected one of 'auto', 'cpu'.*, got 'gpu'$"):
        _backends._read_environment()


def test_choosing_costs_next_to_nothing(op):
    problem = Problem(CPU, 1)
    calls = 20_000
    seconds = min(timeit.repeat(lambda: op.choose(problem), number=calls, repeat=5)) / calls
    assert seconds < 5e-6, f"{1e6 * seconds:.2f} us per choice; about 0.5 us on an idle machine"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_follows_the_choice(op, dynamic):
    def shifted(x, backend=None):
        return x + (1 if op.choose(prepare(x), backend) == "cpu" else 2)

    torch.compiler.reset()
    compiled = torch.compile(shifted, fullgraph=True, dynamic=dynamic, backend="eager")
    x = torch.zeros(3)
    assert compiled(x)[0] == 1
    with use_backend("portable"):
        assert compiled(x)[0] == 2
    assert compiled(x)[0] == 1
    assert compiled(x, "portable")[0] == 2
    assert compiled(torch.zeros(7))[0] == 2
    assert compiled(torch.zeros(8))[0] == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_warning_is_given_while_compiling(op, dynamic):
    def shifted(x):
        return x + (1 if op.choose(prepare(x, CUDA)) == "cpu" else 2)

    torch.compiler.reset()
    compiled = torch.compile(shifted, fullgraph=True, dynamic=dynamic, backend="eager")
    with pytest.warns(RuntimeWarning, match="toy: no kernel can run on this GPU"):
        assert compiled(torch.zeros(9))[0] == 2
