"""Of what a pickle says nothing is run: names are refused, lengths not believed, depth is no matter."""

import io
import pickle
import struct
import tracemalloc

import pytest

from fastbeit.errors import TokenizerError
from fastbeit.weights.pickles import MAX_OPCODES
from fastbeit.weights.tokenizers import read_released
from helpers.hostile import TEN_GB, call, refused, text, wrapped


def attacks(mark: str) -> dict[str, tuple[bytes, str]]:
    """Bodies that make the file `mark` when they are run, each in one way, and what the refusal names."""
    touch = text(f"touch {mark}")
    write = text(f"open({mark!r}, 'w')")
    return {
        "os.system": (call("os.system", touch), "wants os.system: refused, nothing was run"),
        "posix.system": (call("posix.system", touch), "wants posix.system: refused"),
        "builtins.eval": (call("builtins.eval", write), "wants builtins.eval: refused"),
        "nested": (
            call("collections.OrderedDict", b"]" + call("os.system", touch) + b"a"),
            "wants os.system: refused",
        ),
        "found by name": (
            b"(" + call("builtins.getattr", call("importlib.import_module", text("os")), text("system")),
            "wants builtins.getattr: refused",
        ),
        "by a method": (call("torch.serialization.os.system", touch), "wants torch.serialization.os.system: refused"),
        "protocol 4": (text("os") + text("system") + b"\x93" + touch + b"\x85R", "wants os.system: refused"),
        "protocol 0": (b"(" + touch + b"ios\nsystem\n", "wants os.system: refused"),
        "a class": (b"(" + touch + b"cos\nsystem\no", "wants os.system: refused"),
    }


@pytest.mark.parametrize("container", ["plain", "zip", "legacy"])
@pytest.mark.parametrize("attack", list(attacks("")))
def test_a_name_that_is_not_allowed_is_refused_and_nothing_is_run(tmp_path, container, attack):
    mark, file = tmp_path / "ran", tmp_path / "x.pkl"
    body, message = attacks(str(mark))[attack]
    file.write_bytes(wrapped(body, container))
    refused(file, message)
    assert not mark.exists()


def test_the_attacks_are_real(tmp_path):
    mark = tmp_path / "ran"
    for name in ("os.system", "builtins.eval", "nested", "protocol 4", "protocol 0"):
        try:
            result = pickle.loads(wrapped(attacks(str(mark))[name][0], "plain"))
        except TypeError:
            # what the call gives is no pair for an OrderedDict; by then it was made
            result = None
        if isinstance(result, io.IOBase):
            result.close()
        assert mark.exists(), name
        mark.unlink()


SEQUENTIAL = b"ctorch.nn.modules.container\nSequential\n"


def storage_of(num_values: int) -> bytes:
    size = b"J" + struct.pack("<i", num_values)
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + size + b"tQ"


MISUSES = {
    "a class is called": (SEQUENTIAL + b")R", "wants to call torch.nn.modules.container.Sequential: refused"),
    "a function is made": (b"ccollections\nOrderedDict\n)\x81", "to make collections.OrderedDict with 0 arguments"),
    "arguments": (SEQUENTIAL + text("x") + b"\x85\x81", "to make torch.nn.modules.container.Sequential with 1 arg"),
    "a text is called": (text("os.system") + b")R", "wants Name, found str"),
    "arguments in a list": (SEQUENTIAL + b"]R", "wants tuple, found list"),
    "a state that is none": (SEQUENTIAL + b")\x81Nb", "wants dict, found NoneType"),
    "a state of a list": (b"]}b", "wants dict, found list"),
    "modules in a list": (SEQUENTIAL + b")\x81}" + text("_modules") + b"]sb", "wants dict, found list"),
    "a module that is none": (SEQUENTIAL + b")\x81}" + text("_modules") + b"}" + text("a") + b"Nssb", "wants Record"),
    "a long name": (b"}" + text("a" * 300) + b"Ns", "names of at most 256 letters for its tensors, found aaa"),
    "no name": (b"}K\1Ns", "names of at most 256 letters for its tensors, found int"),
    "no value": (b"0R", "wants the pickle opcode POP|wants a value, found none"),
    "no key": (b"}(Nu", "wants keys that are texts or numbers"),
    "nothing put": (b"h\5", "refers to what it did not say"),
    "no mark": (b"t", "wants a mark, found none"),
    "two storages": (storage_of(1) + storage_of(2), "wants one storage under a key, found two"),
    "no pairs": (b"ccollections\nOrderedDict\n]Na\x85R", "wants pairs of a name and a value"),
    "a parameter of nothing": (b"ctorch._utils\n_rebuild_parameter\n)R", "wants TensorSpec, found NoneType"),
    "a name of bytes": (b"C\1xC\1y\x93", "wants str, found bytes"),
    "a backslash": (b"cos\\(\nsystem\n", "damaged or no file of torch"),
    "a long refusal": (b"c" + b"o" * 999 + b"\nx\n", "wants " + "o" * 80 + r"\.\.\.: refused"),
    "colours": (text("\x1b[31m") + text("\n") + b"\x93", r"wants \\x1b\[31m.\\n: refused"),
}


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("body, message", MISUSES.values(), ids=list(MISUSES))
def test_what_is_allowed_is_allowed_in_its_place(tmp_path, container, body, message):
    (tmp_path / "x.pkl").write_bytes(wrapped(body, container))
    refused(tmp_path / "x.pkl", message)


LENGTHS = {
    "text": b"\x8d" + struct.pack("<Q", TEN_GB) + b"abc",
    "text of 4 GB": b"X" + b"\xff" * 4,
    "bytes": b"B" + b"\xff" * 4,
    "bytes of 10 GB": b"\x8e" + struct.pack("<Q", TEN_GB),
    "bytearray": b"\x96" + struct.pack("<Q", TEN_GB),
    "number": b"\x8b" + struct.pack("<i", (1 << 31) - 1),
    "frame": b"\x95" + struct.pack("<Q", TEN_GB),
    "memo": b"Nr" + b"\xff" * 4,
}


@pytest.mark.parametrize("container", ["plain", "zip", "legacy"])
@pytest.mark.parametrize("body", LENGTHS.values(), ids=list(LENGTHS))
def test_a_length_of_10_gb_is_not_believed(tmp_path, container, body):
    (tmp_path / "x.pkl").write_bytes(wrapped(body, container))
    tracemalloc.start()
    with pytest.raises(TokenizerError):
        read_released(tmp_path / "x.pkl")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_depth_does_not_bring_it_down(tmp_path, container):
    deep = 200_000
    sequential = SEQUENTIAL + b")\x81"
    bombs = {
        "a tensor under a, found tuple": b"}(" + text("a") + b")" + b"\x85" * deep + b"u",
        "keys that are texts or numbers": b"})" + b"\x85" * deep + b"Ns",
        "more than": b"N" * (MAX_OPCODES + 1),
        "deeper than 8": _tree(sequential, 1, 9),
        # each module's one child is the module itself
        "deeper than 8: refused": sequential + b"q\0}(" + text("_modules") + b"}" + text("a") + b"h\0sub",
        # ten children each, all of them the same
        "modules and tensors": _tree(sequential, 10, 6),
        "a module or a state dict, found list": b"]q\0h\0a",
    }
    for message, body in bombs.items():
        (tmp_path / "x.pkl").write_bytes(wrapped(body, container))
        refused(tmp_path / "x.pkl", message)


def _tree(sequential: bytes, num_children: int, depth: int) -> bytes:
    body = sequential + b"q\0"
    for level in range(depth):
        children = b"".join(text(str(i)) + b"h" + bytes([level]) for i in range(num_children))
        body += sequential + b"}(" + text("_modules") + b"}(" + children + b"uub" + b"q" + bytes([level + 1])
    return body
