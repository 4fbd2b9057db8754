"""Files from strangers: refused in one line that names them, or right; never run as code."""

import ast
import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace

from effad_core import EfficientAD, OperatingPoint, RunError
from effad_core.distillation.algorithm import main as distil
from effad_core.evaluation import tasks
from effad_core.storage.runs import Run
from effad_core.storage.weights import MAX_HEADER, load_weights, read_tensors, write_tensors

import nbformat
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).parents[1]
KNOWN = {"__metadata__": {"effad": '{"kind": "thing"}'}}
FUZZED = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def pack(path, header, content=b"", length=None):
    """A safetensors file byte by byte: the header's length, the header, the tensors."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + header + content)
    return path


def entry(shape=(1,), offsets=(0, 4), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path, call):
    """The sentence, which names the file and is one line of a bearable length."""
    with pytest.raises(RunError) as error:
        call(path)
    message = str(error.value)
    assert path.name in message and message.isprintable() and len(message) < 600
    return message


def test_the_format_as_it_is_packed_here_is_read(tmp_path):
    content = struct.pack("<3f", 1, 2, 3)
    header = KNOWN | {"a": entry([2], [0, 8]), "b": entry([], [8, 12])}
    tensors, found = read_tensors(pack(tmp_path / "x", header, content), "thing")
    assert found == {"kind": "thing"}
    assert tensors["a"].tolist() == [1, 2] and tensors["b"].item() == 3


FOUR = bytes(4)
HEADERS = {
    "huge": (KNOWN, b"", 2**63),
    "above the limit": (KNOWN, b"", MAX_HEADER + 1),
    "negative": (KNOWN, b"", 2**64 - 1),
    "zero": (KNOWN, b"", 0),
    "too short": (KNOWN, b"", 5),
    "no JSON": (b"hello",),
    "a list": ([1, 2],),
    "a number": (b"3",),
    "null": (b"null",),
    "no UTF-8": (b'{"\xff\xfe":1}',),
    "a line break": (b'{"a\\nb":' + json.dumps(entry(offsets=[4, 0])).encode() + b"}", FOUR),
    "a long name": ({"x" * 9999: entry(offsets=[4, 0])}, FOUR),
    "nested": (b'{"a":' * 9999 + b"1" + b"}" * 9999,),
    "metadata of numbers": ({"__metadata__": {"effad": 3}},),
    "metadata in a list": ({"__metadata__": [1]},),
    "ours nested": ({"__metadata__": {"effad": "[" * 99_999}},),
    "ours nested and closed": ({"__metadata__": {"effad": '{"a":' * 9999 + "1" + "}" * 9999}},),
    "ours a list": ({"__metadata__": {"effad": "[1]"}},),
    "ours a long number": ({"__metadata__": {"effad": '{"kind": ' + "9" * 5000 + "}"}},),
    "ours twice": ({"__metadata__": {"effad": '{"kind": "x", "kind": "thing"}'}},),
    "of another kind": ({"__metadata__": {"effad": '{"kind": ["thing"]}'}},),
    "overlapping": (KNOWN | {"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, bytes(12)),
    "the same twice": (KNOWN | {"a": entry(), "b": entry()}, FOUR),
    "with a gap": (KNOWN | {"a": entry(), "b": entry([1], [8, 12])}, bytes(12)),
    "with a rest": (KNOWN | {"a": entry()}, bytes(8)),
    "out of range": (KNOWN | {"a": entry([2], [0, 8])}, FOUR),
    "reversed": (KNOWN | {"a": entry(offsets=[4, 0])}, FOUR),
    "negative offset": (KNOWN | {"a": entry(offsets=[-4, 0])}, FOUR),
    "terabytes": (KNOWN | {"a": entry([2**40], [0, 2**42])}, FOUR),
    "a product that overflows": (KNOWN | {"a": entry([2**33, 2**33])}, FOUR),
    "a negative size": (KNOWN | {"a": entry([-1])}, FOUR),
    "half a size": (KNOWN | {"a": entry([1.5])}, FOUR),
    "no shape": (KNOWN | {"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR),
    "an unknown type": (KNOWN | {"a": entry(dtype="F99")}, FOUR),
    "a name twice": (
        b'{"a":%s,"a":%s,"__metadata__":{"effad":"{\\"kind\\":\\"thing\\"}"}}'
        % ((json.dumps(entry()).encode(),) * 2),
        FOUR,
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_forged(tmp_path, case):
    path = pack(tmp_path / "stranger", *HEADERS[case])
    message = refused(path, lambda path: read_tensors(path, "thing"))
    assert "is not a whole safetensors file (" in message or "not a thing that" in message


def test_what_a_header_must_hold(tmp_path):
    path = tmp_path / "x.safetensors"
    for value in (None, True, 1.0, "1", [1]):
        write_tensors(path, {}, {"kind": "thing", "n": value})
        message = refused(path, lambda path: read_tensors(path, "thing", n=int))
        assert "damaged header: 'n' is missing or no int" in message
    write_tensors(path, {}, {"kind": "thing", "n": 1})
    assert read_tensors(path, "thing", n=int)[1]["n"] == 1


# --- weights --------------------------------------------------------------------------------------

FORMATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OTHERS = [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FORMATS + OTHERS)
def test_formats_of_weights(tmp_path, dtype):
    path, layer = tmp_path / "x.safetensors", nn.Linear(2, 1)
    weights = {"weight": torch.tensor([[1.0, 0.0]]), "bias": torch.tensor([1.0])}
    write_tensors(path, {k: v.to(dtype) for k, v in weights.items()}, {"kind": "thing"})
    found, _ = read_tensors(path, "thing")
    if dtype in OTHERS:
        message = refused(path, lambda path: load_weights(layer, found, path))
        assert f"holds {dtype}, expected torch.float32" in message
        return
    load_weights(layer, found, path)
    assert all(layer.state_dict()[name].equal(value) for name, value in weights.items())
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_weights_that_are_not_finite(value):
    """The last one is, until it is rounded to the module's float32."""
    layer = nn.Linear(1, 2)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weights = {"weight": torch.ones(2, 1), "bias": torch.tensor([0, value], dtype=torch.float64)}
    message = refused(Path("some.file"), lambda path: load_weights(layer, weights, path))
    assert "NaN or infinite values in 'bias'" in message
    assert all(layer.state_dict()[name].equal(tensor) for name, tensor in before.items())


def test_whole_numbers_stay_whole_numbers():
    norm = nn.BatchNorm1d(1)
    weights = dict(norm.state_dict()) | {"num_batches_tracked": torch.tensor(7)}
    load_weights(norm, weights, "some.file")
    assert norm.num_batches_tracked == 7
    weights["num_batches_tracked"] = torch.tensor(7.0)
    with pytest.raises(RunError, match="holds torch.float32, expected torch.int64"):
        load_weights(norm, weights, "some.file")


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,) * 500])
def test_odd_shapes(shape):
    weights = {"weight": torch.ones(2, 1), "bias": torch.ones(shape)}
    message = refused(Path("some.file"), lambda path: load_weights(nn.Linear(1, 2), weights, path))
    assert "'bias' has shape (" in message


# --- detectors ------------------------------------------------------------------------------------


@pytest.fixture
def saved(narrow, tmp_path):
    """A function that saves a detector with changes to its header or tensors."""
    ad = narrow()
    path = tmp_path / "detector.safetensors"
    ad.save(path)
    tensors, header = read_tensors(path, "detector")

    def save(change=None, **weights):
        write_tensors(path, tensors | weights, header | (change or {}))
        return path

    return save


NESTED = json.loads("[" * 90 + "]" * 90)
STRANGE = [None, True, False, -1, 0, 3, 2.5, 10**9, 10**40, float("nan"), "", "x" * 9999, "\ud800"]
STRANGE += [[], {}, [None], ["a", "b"], [10**9] * 2, [300.0, 300], [256] * 3, {"a": 1}, NESTED]
KEYS = ["size", "padding", "image_size", "out_channels", "card", "operating_points"]
WELCOME = {"padding": [False], "card": [{}, {"a": 1}], "operating_points": [{}, {"a": 1}]}
CELLS = ("padding", True)  # its maps have other cells than the file's


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_a_detectors_header(saved, key):
    welcome = [json.dumps(value) for value in WELCOME.get(key, ())]
    for value in STRANGE:
        path = saved({key: value})
        if json.dumps(value) in welcome:
            assert EfficientAD.load(path).image_size == (256, 256)
        else:
            message = refused(path, EfficientAD.load)
            other = value == 3 or (key, value) == CELLS
            assert ("has a header" in message) or ("damaged header" in message) or other
            if (key, value) == CELLS:
                assert "'cell_means' has shape (2, 56, 56), expected (2, 64, 64)" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_channels": 10**9}, "out_channels must be 1 to 4096, not 1000000000"),
        ({"image_size": [10**9, 256]}, "image_size must be at most 16777216 pixels"),
        ({"image_size": [True, 256]}, r"image_size must be pixels, or \(height, width\)"),
        ({"image_size": [256, 255]}, "at least 256 pixels"),
        ({"padding": 0}, "padding must be True or False, not 0"),
        ({"size": "large"}, "size must be"),
    ],
)
def test_numbers_of_a_header_have_bounds(saved, change, message):
    with pytest.raises(RunError, match=f"detector.safetensors has a header that .*{message}"):
        EfficientAD.load(saved(change))


POINT = {"threshold": 0.5, "kind": "labels-f1", "images": 3}


@pytest.mark.parametrize("name", ["threshold", "pixel_threshold"])
@pytest.mark.parametrize(
    "change",
    [
        *({"threshold": value} for value in (float("nan"), float("inf"), None, "0.5", True, [1])),
        *({"images": value} for value in (0, -1, 2.5, True, None)),
        *({"kind": value} for value in ("guess", None, ["labels-f1"], 1)),
        *({"rate": value} for value in (0.5, float("nan"))),
        {"another": 1},
    ],
)
def test_operating_points(saved, name, change):
    message = refused(saved({"operating_points": {name: POINT | change}}), EfficientAD.load)
    assert "does not describe a detector" in message


def test_a_good_operating_point_is_read(saved):
    ad = EfficientAD.load(saved({"operating_points": {"threshold": POINT}}))
    assert ad.operating_point == OperatingPoint(**POINT) and ad.pixel_operating_point is None


def test_a_detector_without_provenance_can_be_trained(saved):
    assert EfficientAD.load(saved({"card": {"note": 1}})).card == {"teacher": "unknown", "note": 1}


def test_tensors_that_lack_or_are_too_many(saved):
    assert "has in addition 'x'" in refused(saved(x=torch.ones(1)), EfficientAD.load)
    long = {"x\n" * 5000: torch.ones(1)}
    assert "has in addition" in refused(saved(**long), EfficientAD.load)
    path = saved()
    tensors, header = read_tensors(path, "detector")
    for name in tensors.keys() - {"cell_means"}:
        write_tensors(path, {k: v for k, v in tensors.items() if k != name}, header)
        assert f"lacks '{name}'" in refused(path, EfficientAD.load)


def test_detectors_of_before_there_were_means_of_cells(saved):
    tensors, header = read_tensors(path := saved(), "detector")
    tensors.pop("cell_means")
    write_tensors(path, tensors, header)
    assert EfficientAD.load(path).cell_means.equal(torch.ones(2, 56, 56))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_means_of_cells_that_nothing_can_be_divided_by(saved, value):
    means = torch.ones(2, 56, 56)
    means[1, 3, 4] = value
    message = refused(saved(cell_means=means), EfficientAD.load)
    assert "has a cell mean that is not above 0" in message or "in 'cell_means'" in message


@FUZZED
@given(data=st.data())
def test_a_detector_with_any_bytes_changed(saved, data):
    """Mostly its header; what still loads has finite numbers and maps."""
    path = saved({"operating_points": {"threshold": POINT}})
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, 7 + length) | st.integers(0, len(content) - 1))
        content[where : where + data.draw(st.integers(1, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        ad = EfficientAD.load(path)
    except RunError as error:
        assert path.name in str(error) and str(error).isprintable()
        return
    assert all(tensor.isfinite().all() for tensor in ad.state_dict().values())
    assert max(ad.image_size) <= 4096**2 and (ad.sigma > 0).all() and (ad.cell_means > 0).all()
    assert not ad.operating_point or isinstance(ad.operating_point, OperatingPoint)


# --- teachers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", [None, [], [["a", 1]], "card", 3])
def test_teachers_whose_card_is_no_card(narrow, drawn, tmp_path, card, monkeypatch, refusal):
    ad = narrow()
    path = tmp_path / "teacher.safetensors"
    write_tensors(path, ad.teacher.state_dict(), {"kind": "teacher", "card": card})
    assert "'card' is missing or no dict" in refused(path, ad.load_teacher)
    psi = SimpleNamespace(out_channels=8)
    monkeypatch.setattr("effad_core.distillation.algorithm.open_extractor", lambda *_: psi)
    said = refusal(distil, drawn[0].parent, "--measure", path, "--hold-out", "1")
    assert "teacher.safetensors has a damaged header" in said


@pytest.mark.parametrize("change", [{"iteration": "3"}, {"iteration": True}, {"config": []}])
def test_a_checkpoint_to_start_from_with_a_damaged_header(
    drawn, tmp_path, change, monkeypatch, refusal
):
    path = tmp_path / "checkpoint.safetensors"
    write_tensors(path, {}, {"kind": "checkpoint", "iteration": 1, "config": {}} | change)
    psi = SimpleNamespace(out_channels=8)
    monkeypatch.setattr("effad_core.distillation.algorithm.open_extractor", lambda *_: psi)
    said = refusal(distil, drawn[0].parent, "--measure", path, "--hold-out", "1")
    assert "checkpoint.safetensors has a damaged header" in said


@pytest.mark.parametrize("value", [*STRANGE, {"all": {"image_auroc": float("nan")}}])
def test_metrics_that_are_no_metrics_are_measured_again(tmp_path, capsys, value):
    path, good = tmp_path / "metrics.json", {"all": {"image_auroc": 0.5}}
    path.write_text(json.dumps({"detector": "ab", "metrics": good}))
    assert tasks._read_metrics(path, {"detector": "ab"}) == good
    assert tasks._read_metrics(path, {"detector": "cd"}) is None
    assert capsys.readouterr().out == ""
    for content in (value, {"detector": "ab", "metrics": value}):
        path.write_text(json.dumps(content))
        assert tasks._read_metrics(path, {"detector": "ab"}) is None
    assert "metrics.json is damaged and is written anew" in capsys.readouterr().out


def stepped(folder):
    """A run of a linear layer after one step, saved."""
    layer = nn.Linear(3, 2)
    run = Run(folder, {}, {"net": layer}, {"adam": torch.optim.Adam(layer.parameters())}, total=2)
    with run:
        run.resume()
        layer(torch.ones(1, 3)).sum().backward()
        run.optimizers["adam"].step()
        run.save(1)
    return run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("adam.0.exp_avg_sq"), "lacks a part of its optimizer's state"),
        (lambda t: t.update({"adam.2.step": torch.tensor(1.0)}), "'2.step' .* no parameter"),
        (lambda t: t.update({"adam.x": torch.tensor(1.0)}), "'x' .* no parameter"),
        (lambda t: t.update({"adam.00.step": torch.tensor(1.0)}), "'00.step' .* no parameter"),
        (lambda t: t.update({"adam.0.exp_avg": torch.ones(9)}), "'0.exp_avg' .* no parameter"),
        (lambda t: t["adam.1.exp_avg"].fill_(torch.nan), "'1.exp_avg' .* is not finite"),
        (lambda t: t.update({"adam.1.step": torch.tensor(True)}), "'1.step' .* is not finite"),
        (lambda t: t["net.bias"].fill_(torch.inf), "NaN or infinite values in 'bias'"),
    ],
)
def test_checkpoints_that_would_break_the_next_step(tmp_path, change, message):
    stepped(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    tensors, header = read_tensors(path, "checkpoint")
    change(tensors)
    write_tensors(path, tensors, header)
    with pytest.raises(RunError, match=f"checkpoint.safetensors .*{message}"):
        stepped(tmp_path)


# --- nothing in a file is ever run ----------------------------------------------------------------

CODE = [path for part in ("effad_core", "baselines", "notebooks", "benchmarks", "docs") for path in
        sorted((ROOT / part).rglob("*.py"))]  # fmt: skip
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NEVER = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}  # modules
CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
CALLS |= {"yaml.full_load", "torch.jit.load", "torch.hub.load", "pd.read_pickle", "__import__"}


def running_code(tree):
    """What in some code could run what a file holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from (name for name in names if name.split(".")[0] in NEVER)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in CALLS or name.split(".")[0] in NEVER:
            yield name
        if name == "torch.load" and options.get("weights_only") != "True":
            yield name
        if options.get("allow_pickle", "False") != "False":
            yield "allow_pickle"
        if options.get("shell", "False") != "False":
            yield "shell"
        if options.get("weights_only", "True") != "True":
            yield "weights_only"
        zipped = name.startswith("zipfile.ZipFile(")  # makes no links, and keeps names inside
        if name.endswith((".extractall", ".extract")) and (
            not zipped and options.get("filter") != "'data'"
        ):
            yield name


def cells(path):
    """A notebook's code, without the lines that are IPython's."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            yield "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in lines)


@pytest.mark.parametrize("path", CODE + NOTEBOOKS, ids=lambda path: path.name)
def test_no_code_runs_what_a_file_holds(path):
    sources = cells(path) if path.suffix == ".ipynb" else [path.read_text(encoding="utf-8")]
    assert [found for source in sources for found in running_code(ast.parse(source))] == []


def test_torch_load_reads_only_the_weights_of_published_backbones():
    users = [path.name for path in CODE if "torch.load(" in path.read_text(encoding="utf-8")]
    assert users == ["teachers.py"]
    assert CODE and len(NOTEBOOKS) > 9


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from pickle import loads", "import joblib.memory", "pickle.loads(b)"),
        *("torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=safe)"),
        *("np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=yes)", "yaml.load(f)"),
        *("eval(x)", "exec(x)", "os.system(x)", "subprocess.run(x, shell=True)"),
        *("tar.extractall(p)", "tar.extractall(p, filter='fully_trusted')", "zipped.extract(a)"),
    ],
)
def test_each_rule_can_fail(code):
    assert list(running_code(ast.parse(code)))


def test_a_pickle_is_never_unpickled(tmp_path):
    """Not even under the name of a detector: what it would do does not happen."""
    path = tmp_path / "detector.safetensors"

    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    torch.save({"weight": Harm()}, path)
    for call in (EfficientAD.load, EfficientAD(out_channels=4).load_teacher):
        assert "is not a whole safetensors file" in refused(path, call)
    save_file({"a": torch.ones(1)}, tmp_path / "bare.safetensors")
    assert "not a detector" in refused(tmp_path / "bare.safetensors", EfficientAD.load)
    assert not (tmp_path / "harm").exists()
