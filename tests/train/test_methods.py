"""The methods of the papers by name, on the command line and in a program."""

from pathlib import Path

import pytest

from apts_mpi import APTSOptions, InvalidInput, LocalOptions
from apts_mpi.options.methods import METHODS, describe_method, of_method, options_of, value_of
from apts_mpi.records.reading import read_records
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.parser import parse

PAPERS = [name for name in METHODS if name != "two-level"]


def test_the_default_is_no_other_than_without_a_name():
    assert of_method("two-level") == APTSOptions()
    assert parse(["--method", "two-level"])[0] == TrainingOptions()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("written", [["--method", "{}"], ["--method={}"]])
def test_command_line_and_program_have_the_same(name, written):
    options, _ = parse([part.format(name) for part in written])
    for option, value in options_of(name).items():
        assert value_of(options, option) == value == value_of(of_method(name), option)


@pytest.mark.parametrize("name", PAPERS)
def test_what_is_given_counts_wherever_it_stands(name):
    for arguments in (["--method", name, "--local.iterations=7"], ["--local.iterations", "7", f"--method={name}"]):
        options, _ = parse(arguments)
        assert options.local == LocalOptions(solver="tr", iterations=7)
        assert describe_method(name, options).endswith("changed: local.iterations 7 for 3")
    assert of_method(name, {"local.iterations": 7}).local.iterations == 7
    assert "changed" not in describe_method(name, of_method(name))


@pytest.mark.parametrize("name", PAPERS)
def test_a_saved_configuration_makes_the_same_run_again(name, tmp_path):
    options, text = parse([f"--method={name}", "--local.iterations=2", "--subdomains=3"])
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    assert parse([f"--config={path}"])[0] == options


def test_a_method_of_the_command_line_changes_what_a_file_has(tmp_path):
    """Such as one that --print_config has written, with every default."""
    path = tmp_path / "config.yaml"
    path.write_text(parse(["--epochs=4", "--subdomains=3"])[1], encoding="utf-8")
    for arguments in ([f"--config={path}", "--method=napts"], ["--method", "napts", "--config", str(path)]):
        options = parse([*arguments, "--local.iterations=2"])[0]
        assert (options.method, options.epochs, options.subdomains) == ("napts", 4, 3)
        assert options.trust_region.window == 5 and options.local.iterations == 2


def test_another_method_replaces_all_of_an_earlier_one():
    earlier = [f"--{name}={value}" for name, value in (("method", "napts"), ("trust_region.window", 9))]
    _, saved = parse(earlier)
    assert "window: 9" in saved
    assert parse(["--method=two-level"], earlier)[0] == TrainingOptions()


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("iapts", "schwarz.variant", "exact"),
        ("apts", "schwarz.variant", "inexact"),
        ("apts", "coarse.model", "gauss-newton"),
        ("iapts", "trust_region.window", 3),
        ("apts-data", "schwarz.decomposition", "parameters"),
        ("napts", "coarse.model", "none"),
        ("napts", "trust_region.window", 0),
        ("apts", "noise", "batches"),
    ],
)
def test_what_contradicts_a_method_is_refused_with_both_named(name, option, value):
    words = f"{option}: .* contradicts --method {name}"
    with pytest.raises(InvalidInput, match=words):
        of_method(name, {option: value, "schwarz.assembly": "mean"} if value == "parameters" else {option: value})
    more = ["--schwarz.assembly=mean"] if value == "parameters" else []
    with pytest.raises(InvalidInput, match=words):
        parse([f"--method={name}", f"--{option}={value}", *more])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"locals.iterations": 3}, "names no option"),
        ({"local.iteration": 3}, "names no option"),
        ({"subdomain": 3}, "names"),
    ],
)
def test_unknown_options_are_refused(changes, words):
    with pytest.raises(InvalidInput, match=words):
        of_method("apts", changes)
    with pytest.raises(InvalidInput, match="method: 'aptz' .* choose one of two-level, apts"):
        of_method("aptz")


@pytest.mark.mpi
def test_local_reductions_predict_the_plain_sum_alone(world, trained):
    output = trained("--problem=digits", "--epochs=1", "--schwarz.prediction=local", "--subdomains=2", status=2)
    assert world.rank > 0 or "schwarz.prediction: 'local' is for the plain sum" in output


@pytest.mark.mpi
@pytest.mark.parametrize("name", PAPERS)
def test_every_method_lowers_the_loss(world, trained, name):
    output = trained("--problem=digits", "--epochs=2", f"--method={name}", "--subdomains=3", "--view", "--run-dir=run")
    assert world.rank > 0 or f"method: {name} (arXiv" in output
    losses = read_records(Path("run")).column("epochs", "train_loss")
    assert losses[-1] < losses[0] < 2.4
