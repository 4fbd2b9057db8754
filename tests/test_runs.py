"""What a run writes survives kills and refuses damage, naming the file."""

import json

from effad_core.errors import RunError
from effad_core.storage import files, runs
from effad_core.storage.files import write_text
from effad_core.storage.runs import Run, settled_precision
from effad_core.storage.weights import load_weights, read_tensors, write_tensors

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}


def new_run(folder, **config):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    config = {"seed": 0, "schedule": {"lr": 0.1}} | config
    return Run(folder, config, {"net": network}, {"optimizer": optimizer}, total=20)


def step(run):
    """One step on fixed data."""
    network = run.modules["net"]
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    run.optimizers["optimizer"].zero_grad()
    network(images).square().mean().backward()
    run.optimizers["optimizer"].step()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_tensors_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    transposed = TENSORS | {"c": TENSORS["a"].T}
    write_tensors(path, transposed, {"kind": "thing", "n": [1, None]})
    tensors, header = read_tensors(path, "thing")
    assert header == {"kind": "thing", "n": [1, None]} and names(tmp_path) == [path.name]
    assert tensors.keys() == transposed.keys()
    assert all(torch.equal(tensors[name], transposed[name]) for name in tensors)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), RunError),
    ],
)
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, error, found):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {"kind": "old"})
    write_text(tmp_path / "x.txt", "old")

    def killed(part, content):
        part.write_text("half")
        raise error

    sentence = None if found is KeyboardInterrupt else "cannot be written: the disk is full; free"
    monkeypatch.setattr(type(path), "write_bytes", killed)
    with pytest.raises(found, match=sentence):
        write_tensors(path, TENSORS, {"kind": "new"})
    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(found, match=sentence):
        write_text(tmp_path / "x.txt", "new")
    assert read_tensors(path, "old") and (tmp_path / "x.txt").read_text() == "old"
    assert names(tmp_path) == ["x.safetensors", "x.txt"]


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {"kind": "thing"})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match="x.safetensors is not a whole safetensors file"):
        read_tensors(path, "thing")


@pytest.mark.parametrize("metadata", [None, {"effad": "null"}, {"effad": '{"kind": "teacher"}'}])
def test_foreign_file_is_named(tmp_path, metadata):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(RunError, match=r"x.safetensors is .* not a detector"):
        read_tensors(tmp_path / "x.safetensors", "detector")


def test_other_damage_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(RunError, match="x.safetensors does not exist"):
        read_tensors(path, "thing")
    path.write_bytes(b"PK\x03\x04 a pickle, perhaps" * 9)
    with pytest.raises(RunError, match="x.safetensors is not a whole"):
        read_tensors(path, "thing")
    save_file(TENSORS, path, metadata={"effad": "{not json"})
    with pytest.raises(RunError, match="x.safetensors is not a whole"):
        read_tensors(path, "thing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("bias"), "lacks 'bias'"),
        (lambda w: w.update(extra=torch.ones(1)), "has in addition 'extra'"),
        (lambda w: w.update(weight=torch.ones(2, 4)), r"'weight' has shape \(2, 4\), expected"),
    ],
)
def test_other_architecture_is_named_and_nothing_loaded(change, message):
    module = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    weights = {name: value + 1 for name, value in before.items()}
    change(weights)
    with pytest.raises(RunError, match=f"some.file is of another architecture: .*{message}"):
        load_weights(module, weights, "some.file")
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_resumed_run_continues_bit_for_bit(tmp_path):
    whole = new_run(None)
    assert whole.resume() == (0, {})
    for _ in range(4):
        step(whole)
    first = new_run(tmp_path)
    first.resume()
    for iteration in (1, 2):
        step(first)
        first.log({"iteration": iteration, "loss": 1 / 3 * iteration})
    first.save(2)
    second = new_run(tmp_path)
    assert second.resume() == (2, {"iteration": 2, "loss": 2 / 3})
    for _ in range(2):
        step(second)
    for a, b in zip(
        whole.modules["net"].parameters(), second.modules["net"].parameters(), strict=True
    ):
        assert torch.equal(a, b)
    assert names(tmp_path) == ["checkpoint.safetensors", "config.json", "log.csv"]


def test_log_loses_what_came_after_the_checkpoint(tmp_path):
    run = new_run(tmp_path)
    run.resume()
    step(run)
    for iteration in (10, 20):
        run.log({"iteration": iteration, "loss": 0.5})
    run.save(20)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("30,0.25\n40,0.1\n5")  # written, then killed before the next checkpoint
    done, row = new_run(tmp_path).resume()
    assert (done, row) == (20, {"iteration": 20, "loss": 0.5})
    assert (tmp_path / "log.csv").read_text().splitlines() == ["iteration,loss", "10,0.5", "20,0.5"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, text: path.write_text(text[:-2]),  # the last number, shortened
        lambda path, text: path.write_text(text + "30,0.1\n"),  # the next row, shortened
        lambda path, text: path.write_text(text.replace("0.5", "0.6")),
        lambda path, text: path.write_bytes(b"\xff\0\n" * 9),
        lambda path, text: path.unlink(),
    ],
)
def test_a_damaged_log_is_taken_from_the_checkpoint(tmp_path, damage):
    run = new_run(tmp_path)
    run.resume()
    step(run)
    for iteration in (10, 20):
        run.log({"iteration": iteration, "loss": 0.53125})
    run.window.append(0.25)
    run.save(20)
    path = tmp_path / "log.csv"
    text = path.read_text()
    damage(path, text)
    again = new_run(tmp_path)
    assert again.resume() == (20, {"iteration": 20, "loss": 0.53125}) and again.window == [0.25]
    assert path.read_bytes() == text.encode() == b"iteration,loss\n10,0.53125\n20,0.53125\n"


def saved_checkpoint(folder, iteration):
    """The file of a run of one step, saved as of `iteration`, its tensors and its header."""
    run = new_run(folder)
    run.resume()
    step(run)
    run.save(iteration)
    path = folder / "checkpoint.safetensors"
    return path, *read_tensors(path, "checkpoint")


@pytest.mark.parametrize(
    "history",
    [b"", b"{}", b"[1]", b"\xff", b'{"log": 1, "window": []}', b'{"log": "", "window": 2}'],
)
def test_a_damaged_history_is_named(tmp_path, history):
    path, tensors, header = saved_checkpoint(tmp_path, 1)
    tensors["history"] = torch.tensor(list(history), dtype=torch.uint8)
    write_tensors(path, tensors, header)
    with pytest.raises(RunError, match="checkpoint.safetensors has a damaged history"):
        new_run(tmp_path).resume()


def test_a_checkpoint_without_a_history_is_damaged(tmp_path):
    path, tensors, header = saved_checkpoint(tmp_path, 20)
    del tensors["history"]
    write_tensors(path, tensors, header)
    with pytest.raises(RunError, match="checkpoint.safetensors has a damaged history"):
        new_run(tmp_path).resume()


@pytest.mark.parametrize("log", ["iteration,loss\n20,x\n", "iteration,loss\n20\n", "\n1,2\n"])
def test_a_log_of_something_else_is_named(tmp_path, log):
    path, tensors, header = saved_checkpoint(tmp_path, 20)
    history = json.dumps({"log": log, "window": []}).encode()
    write_tensors(
        path, tensors | {"history": torch.tensor(list(history), dtype=torch.uint8)}, header
    )
    with pytest.raises(RunError, match=f"^{tmp_path} holds a damaged log; delete that folder"):
        new_run(tmp_path).resume()


@pytest.mark.parametrize("iteration", [-1, 21, 2**80])
def test_an_iteration_that_the_run_does_not_have_is_refused(tmp_path, iteration):
    path, tensors, header = saved_checkpoint(tmp_path, 20)
    write_tensors(path, tensors, header | {"iteration": iteration})
    message = f"checkpoint.safetensors is damaged: it is of iteration {iteration} of 20; copy it"
    with pytest.raises(RunError, match=message):
        new_run(tmp_path).resume()


def test_checkpoint_before_the_first_row_of_the_log(tmp_path):
    run = new_run(tmp_path)
    run.resume()
    step(run)
    run.save(1)
    again = new_run(tmp_path)
    assert again.resume() == (1, {})
    again.log({"iteration": 2, "loss": 1.0})
    again.save(2)
    assert (tmp_path / "log.csv").read_text().split() == ["iteration,loss", "2,1.0"]


def test_log_of_an_unfinished_start_is_dropped(tmp_path):
    (tmp_path / "log.csv").write_text("iteration,loss\n1,2\n")
    assert new_run(tmp_path).resume() == (0, {})
    assert not (tmp_path / "log.csv").exists()
    assert json.loads((tmp_path / "config.json").read_text())["schedule"] == {"lr": 0.1}


def test_other_settings_are_refused(tmp_path):
    run = new_run(tmp_path)
    run.resume()
    step(run)
    run.save(1)
    with pytest.raises(RunError, match=r"other settings \(seed: 0, now 1\).*another run_dir"):
        new_run(tmp_path, seed=1).resume()
    with pytest.raises(RunError, match=r"\(extra: None, now 1\)"):
        new_run(tmp_path, extra=1).resume()


def test_checkpoint_cut_short_or_with_a_damaged_header(tmp_path):
    run = new_run(tmp_path)
    run.resume()
    step(run)
    run.save(1)
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(RunError, match="checkpoint.safetensors is not a whole"):
        new_run(tmp_path).resume()
    save_file(TENSORS, path, metadata={"effad": '{"kind": "checkpoint"}'})
    with pytest.raises(RunError, match="checkpoint.safetensors has a damaged header"):
        new_run(tmp_path).resume()


@pytest.mark.parametrize(
    "config",
    [
        b"", b"\xff", b"[" * 9999, b"[]", b"1", b"{}", b'{"schedule": 1}',
        b'{"schedule": {"precision": []}}', b'{"schedule": {"precision": "half"}}',
        b'{"schedule": {"precision": "auto"}}',
    ],
)  # fmt: skip
def test_auto_is_timed_where_no_run_says_what_it_began_with(tmp_path, monkeypatch, config):
    monkeypatch.setattr(runs, "resolve_precision", lambda name, device, work, size: f"now {name}")
    device = torch.device("cpu")
    assert settled_precision("auto", device, None) == "now auto"
    assert settled_precision("auto", device, tmp_path / "new") == "now auto"
    (tmp_path / "config.json").write_bytes(config)
    assert settled_precision("auto", device, tmp_path) == "now auto"
    (tmp_path / "config.json").write_text('{"schedule": {"precision": "bfloat16"}}')
    assert settled_precision("auto", device, tmp_path) == "now bfloat16"
    assert settled_precision("float32", device, tmp_path) == "now float32"


def test_checkpoints_come_when_it_is_time(tmp_path):
    run = new_run(tmp_path)
    run.resume()
    run.after(1)
    assert not (tmp_path / "checkpoint.safetensors").exists()
    run.after(20)  # the last one
    assert new_run(tmp_path).resume()[0] == 20
    run.save_seconds = 0
    run.after(3)
    assert new_run(tmp_path).resume()[0] == 3
