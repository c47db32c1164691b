"""The problem itself, the registry and problems of the user's."""

import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp, linearize

from apts_mpi import problems
from apts_mpi.errors import InvalidInput
from apts_mpi.problems import Problem, losses

SELF_CONTAINED = (
    "digits",
    "digits-cnn",
    "poisson-1d",
    "poisson-2d",
    "poisson-3d",
    "burgers",
    "allen-cahn",
    "helmholtz-2d",
    "wave",
    "advection",
    "gray-scott",
    "lid-driven-cavity",
    "inverse-diffusion",
    "deeponet-sine",
)


def arguments(**changes):
    values = {
        "name": "small",
        "network": nn.Linear(3, 2),
        "loss": nn.functional.mse_loss,
        "train": (torch.zeros(4, 3), torch.zeros(4, 2)),
    }
    return values | changes


def test_problem_defaults():
    problem = Problem(**arguments())
    assert (problem.test, problem.forward, problem.batch_size, problem.accuracy) == (None, None, None, False)
    assert problem.epochs == 10 and problem.metrics == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name: '' is not allowed"),
        ({"network": torch.relu}, "network: .*relu.* give a torch.nn.Module"),
        ({"network": nn.ReLU()}, "no parameter that requires a gradient"),
        ({"network": nn.Linear(3, 2).half()}, "dtype of the network's weight: torch.float16"),
        ({"network": nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).double())}, "1.weight: torch.float64"),
        ({"loss": "mse"}, "loss: 'mse' is not allowed"),
        ({"forward": 3}, "forward: 3 is not allowed"),
        ({"batch_size": 0}, "batch_size: 0 is not allowed"),
        ({"batch_size": 2.0}, "batch_size: 2.0 is not allowed"),
        ({"epochs": True}, "epochs: True is not allowed"),
        ({"accuracy": "yes"}, "accuracy: 'yes' is not allowed"),
        ({"metrics": {"error": 1.0}}, "metrics: .* map names to functions"),
        ({"train": torch.zeros(4, 3)}, "train: Tensor is not allowed"),
        ({"train": (torch.zeros(4, 3), [0, 1])}, r"train targets\[0\]: int 0 is not allowed"),
        ({"train": (torch.zeros(4, 3), torch.zeros(5, 2))}, "train: '4 inputs and 5 targets'"),
        ({"train": (torch.zeros(0, 3), torch.zeros(0, 2))}, r"shape of train inputs: \(0, 3\)"),
        ({"train": (torch.zeros(4, 3).double(), torch.zeros(4, 2))}, "dtype of train inputs: torch.float64"),
        ({"train": (torch.zeros(4, 3), torch.zeros(4, 2).half())}, "dtype of train targets: torch.float16"),
        ({"test": (torch.zeros(4, 3), torch.zeros(1, 2))}, "test: '4 inputs and 1 targets'"),
        ({"accuracy": True}, "dtype of train targets: torch.float32 .* class indices"),
    ],
)
def test_problem_rejects(changes, message):
    with pytest.raises(InvalidInput, match=message):
        Problem(**arguments(**changes))


def build_any(name, text_file, **options):
    """Build a problem that needs no installed data."""
    return problems.build(name, data_dir=str(text_file) if name == "text" else None, **options)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.mark.parametrize("name", (*SELF_CONTAINED, "text"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_loss_fit_the_targets(name, dtype, text_file):
    problem = build_any(name, text_file, dtype=dtype)
    inputs, targets = (part[:7] for part in problem.train)
    outputs = apply(problem, problem.network, inputs)
    loss = problem.loss(outputs, targets)
    assert problem.name == name and outputs.dtype == dtype and loss.shape == () and loss.isfinite()
    halves = [problem.loss(outputs[:3], targets[:3]), problem.loss(outputs[3:], targets[3:])]
    torch.testing.assert_close(loss, (3 * halves[0] + 4 * halves[1]) / 7)
    assert all(isinstance(metric(problem.network), float) for metric in problem.metrics.values())


@pytest.mark.parametrize("name", (*SELF_CONTAINED, "text"))
def test_build_is_deterministic_and_leaves_the_random_state(name, text_file):
    before = torch.get_rng_state()
    first, second, other = (build_any(name, text_file, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    for mine, same in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(mine, same)
    pairs = zip(first.network.parameters(), other.network.parameters(), strict=True)
    assert any(not torch.equal(mine, another) for mine, another in pairs)
    for mine, same in zip(first.train, other.train, strict=True):
        assert torch.equal(mine, same)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch.func's own.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("name", (*SELF_CONTAINED, "text"))
def test_jacobian_products_over_the_parameters(name, text_file):
    """jvp and linearize agree with central differences (float64, so that 1e-6 relative is rounding and curvature)."""
    problem = build_any(name, text_file, dtype=torch.float64)
    inputs = problem.train[0][:5]
    parameters = {name: value.detach() for name, value in problem.network.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tangents = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in parameters.items()
    }

    def outputs(values):
        return apply(problem, lambda points: functional_call(problem.network, values, (points,)), inputs)

    def moved(step):
        return outputs({name: value + step * tangents[name] for name, value in parameters.items()}).detach()

    _, product = jvp(outputs, (parameters,), (tangents,))
    _, linear = linearize(outputs, parameters)
    torch.testing.assert_close(linear(tangents), product)
    step = 1e-6
    torch.testing.assert_close(product, (moved(step) - moved(-step)) / (2 * step), rtol=1e-5, atol=1e-6)


def apply(problem, network, inputs):
    return network(inputs) if problem.forward is None else problem.forward(network, inputs)


def test_weighted_squared_error():
    outputs = torch.tensor([[1.0], [2.0]])
    targets = torch.tensor([[0.0, 3.0], [4.0, 0.5]])
    assert losses.weighted_squared_error(outputs, targets).item() == (3.0 * 1.0 + 0.5 * 4.0) / 2


def test_token_cross_entropy():
    outputs = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    picked = outputs.log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(losses.token_cross_entropy(outputs, targets), -picked.mean())


def test_train_samples():
    whole, part = problems.build("digits"), problems.build("digits", train_samples=10)
    assert torch.equal(part.train[0], whole.train[0][:10]) and torch.equal(part.train[1], whole.train[1][:10])
    assert torch.equal(part.test[0], whole.test[0])
    for wrong in (0, 1439):
        with pytest.raises(InvalidInput, match=f"--train-samples: {wrong} .* digits has 1438 training samples"):
            problems.build("digits", train_samples=wrong)


def test_unknown_name_lists_the_known():
    with pytest.raises(InvalidInput) as raised:
        problems.build("digit")
    assert all(name in str(raised.value) for name in (*problems.names(), "'digit'", "MODULE:FUNCTION"))


def test_a_data_directory_that_nobody_reads_is_rejected():
    with pytest.raises(InvalidInput, match=r"--data-dir: '/tmp' .* digits reads no files"):
        problems.build("digits", data_dir="/tmp")


def test_dtype_must_be_single_or_double():
    with pytest.raises(InvalidInput, match=r"torch.float16 is not allowed"):
        problems.build("digits", dtype=torch.float16)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write a module into the current directory and return ``MODULE:make``; each test has a name of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))

    def write(body, name):
        (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + textwrap.dedent(body))
        return f"{name}:make"

    return write


def test_user_problem_is_returned_as_it_is(user_module):
    name = user_module(
        """
        from apts_mpi.problems import Problem
        def make():
            data = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
            network = nn.Linear(3, 2).double()
            return Problem(name="mine", network=network, loss=nn.functional.mse_loss, train=data, batch_size=2)
        """,
        "user_whole",
    )
    problem = problems.build(name, train_samples=3)
    assert (problem.name, problem.batch_size, len(problem.train[0])) == ("mine", 2, 3)
    assert problem.network.weight.dtype == torch.float64


def test_user_tuple_follows_seed_and_dtype(user_module):
    name = user_module(
        "def make(): return nn.Linear(3, 2), nn.functional.mse_loss, (torch.rand(4, 3), torch.rand(4, 2))\n",
        "user_tuple",
    )
    before = torch.get_rng_state()
    first, second, other = (problems.build(name, seed=seed, dtype=torch.float64) for seed in (1, 1, 2))
    assert first.name == name and first.test is None and not first.accuracy
    assert first.network.weight.dtype == first.train[0].dtype == torch.float64
    assert torch.equal(first.network.weight, second.network.weight)
    assert not torch.equal(first.network.weight, other.network.weight)
    assert torch.get_default_dtype() == torch.float32 and torch.equal(before, torch.get_rng_state())


def test_user_tuple_with_test_set_and_classes(user_module):
    name = user_module(
        """
        def make():
            train = torch.rand(4, 3), torch.zeros(4, dtype=torch.int64)
            return nn.Linear(3, 2), nn.functional.cross_entropy, (train, (train[0][:1], train[1][:1]))
        """,
        "user_split",
    )
    problem = problems.build(name)
    assert problem.accuracy and len(problem.train[0]) == 4 and len(problem.test[0]) == 1


@pytest.mark.parametrize(
    ("module", "body", "messages"),
    [
        ("user_syntax", "def make(:\n", ["importing 'user_syntax' failed with SyntaxError"]),
        ("user_import", "raise RuntimeError('no licence')\n", ["failed with RuntimeError: no licence"]),
        ("user_missing", "def other(): pass\n", ["'user_missing' has no function 'make'", "returns a Problem"]),
        ("user_raises", "def make(): return 1 / 0\n", ["raised ZeroDivisionError: division by zero"]),
        ("user_none", "def make(): return None\n", ["returned NoneType None", "(network, loss, data)"]),
        ("user_pair", "def make(): return 1, 2\n", ["returned a tuple of 2", "(network, loss, data)"]),
        ("user_data", "def make(): return nn.Linear(1, 1), nn.MSELoss(), 3\n", ["wrong tuple: train: int"]),
        ("user_order", "def make(): return nn.MSELoss(), nn.ReLU(), 3\n", ["wrong tuple", "network"]),
    ],
)
def test_user_faults_are_named(user_module, module, body, messages):
    name = user_module(body, module)
    with pytest.raises(InvalidInput) as raised:
        problems.build(name)
    for message in (f"--problem {name}", *messages):
        assert message in str(raised.value)
    assert torch.get_default_dtype() == torch.float32


def test_arguments_that_are_needed_are_named(user_module):
    with pytest.raises(InvalidInput, match="--problem.args: make needs x; give --problem.args.x VALUE"):
        problems.build(user_module("def make(x): return x\n", "user_argument"))


@pytest.mark.parametrize("name", ["no_such_module:make", ":make", "no_such_module:"])
def test_user_module_missing(name):
    with pytest.raises(InvalidInput, match=f"--problem {name}: importing .* failed with .*; give MODULE:FUNCTION"):
        problems.build(name)


def test_arguments_of_the_problems_of_the_package():
    sizes = {}
    for name in SELF_CONTAINED:
        given = {argument: "3" for argument in problems.arguments_of(name)}
        smaller, usual = problems.build(name, arguments=given), problems.build(name)
        sizes[name] = [sum(p.numel() for p in problem.network.parameters()) for problem in (smaller, usual)]
        assert len(smaller.train[0]) <= len(usual.train[0])
        smaller.loss(
            (smaller.forward or (lambda network, inputs: network(inputs)))(smaller.network, smaller.train[0]),
            smaller.train[1],
        )
    assert all(smaller < usual for smaller, usual in sizes.values()), sizes


@pytest.mark.parametrize("name", ["poisson-1d", "poisson-2d", "poisson-3d", "burgers", "allen-cahn"])
def test_problems_with_one_point_of_each_kind(name):
    given = {argument: "1" for argument in problems.arguments_of(name)}
    problem = problems.build(name, arguments=given)
    loss = problem.loss(problem.forward(problem.network, problem.train[0]), problem.train[1])
    assert torch.isfinite(loss)


def test_defaults_of_the_arguments_are_the_problem():
    given = {argument: str(value) for argument, value in problems.arguments_of("burgers").items()}
    one, other = problems.build("burgers", arguments=given), problems.build("burgers")
    assert torch.equal(one.train[0], other.train[0])
    assert all(map(torch.equal, one.network.parameters(), other.network.parameters()))


def test_arguments_of_a_text(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefgh" * 40)
    given = {"width": "8", "heads": "2", "blocks": "1", "context": "5"}
    problem = problems.build("text", data_dir=str(tmp_path), arguments=given)
    assert problem.train[0].shape[1] == 5 and problem.network(problem.train[0][:2]).shape == (2, 5, 8)
    with pytest.raises(InvalidInput, match="--problem.args.heads: 3 is not allowed; give a divisor of the width, 8"):
        problems.build("text", data_dir=str(tmp_path), arguments=given | {"heads": "3"})


def test_arguments_are_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    rows = [line for line in page.partition("### Arguments of problems")[2].splitlines() if line.startswith("| `")]
    for name in problems.names():
        (row,) = [row for row in rows if f"`{name}`" in row.split("|")[1]]
        assert all(f"`{argument}` {value}" in row for argument, value in problems.arguments_of(name).items()), name
