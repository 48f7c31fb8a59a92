"""A pickle of weights, read as data: nothing that it says is imported, called or made.

A pickle is a program. The one read here is run by a small machine that knows numbers, texts, lists, dicts and the names
in `CLASSES`, `CALLS` and `DTYPES`: a name stays a name, an object becomes a `Record` of its state, and a tensor a
`TensorSpec`, which says where its values stand. Any other name is refused before anything is done with it. So whole
modules are read whose classes are not there; `torch.load(weights_only=True)` wants the classes, and refuses modules of
the legacy format even then (torch 2.13).
"""

import pickletools
import warnings
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, NoReturn

import torch

MAX_OPCODES = 1 << 20  # of a pickle; OpenAI's encoder has some 15,000
MAX_DIMS, MAX_SHOWN = 8, 80
DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
CLASSES = {
    "argparse.Namespace",  # the settings of a trainer, beside its weights
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
}


class Name(NamedTuple):
    """What a file names: never looked up."""

    text: str


class Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    num_values: int

    @property
    def num_bytes(self) -> int:
        return self.num_values * self.dtype.itemsize


class TensorSpec(NamedTuple):
    """A tensor that lies densely in its storage."""

    storage: Storage
    offset: int  # in values, as the strides
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.storage.dtype.itemsize


class Record:
    """An object of one of `CLASSES`, by its attributes."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}


class Malformed(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its name."""


class Machine:
    """Runs a pickle's opcodes on a stack of plain values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # stacks that go on where the items after a mark are collected
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self, file: Any) -> Any:
        """The value of the pickle that begins where `file` stands, and ends where it stands then.

        Raises:
            Malformed: it names, or does, what it may not; or it is no pickle.
        """
        try:
            with warnings.catch_warnings():
                # pickletools warns of names with a backslash
                warnings.simplefilter("error")
                for i, (opcode, arg, _) in enumerate(pickletools.genops(file)):
                    if i > MAX_OPCODES:
                        raise Malformed(f"wants more than {MAX_OPCODES} steps to be read: refused")
                    if opcode.name == "STOP":
                        break
                    self.step(opcode.name, arg)
        except (ValueError, Warning) as err:
            raise Malformed(f"is damaged or no file of torch: {shown(str(err))}; download it again") from None
        return self.pop()

    def step(self, opcode: str, arg: Any) -> None:
        if opcode in PUSHED:
            self.push(arg)
        elif opcode in CONSTANTS:
            self.push(CONSTANTS[opcode])
        elif opcode in FRESH:
            self.push(FRESH[opcode]())
        elif opcode in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if opcode == "MEMOIZE" else arg] = self.top(object)
        elif opcode in ("BINGET", "LONG_BINGET"):
            if arg not in self.memo:
                raise Malformed("is damaged: it refers to what it did not say; download it again")
            self.push(self.memo[arg])
        elif opcode == "MARK":
            self.marked.append(self.stack)
            self.stack = []
        elif opcode in ("GLOBAL", "INST"):
            # pickletools puts a blank between module and name
            self.push(_allowed(arg.replace(" ", ".")))
        elif opcode == "STACK_GLOBAL":
            name, module = self.pop(str), self.pop(str)
            self.push(_allowed(f"{module}.{name}"))
        elif opcode == "BINPERSID":
            self.push(self.kept(_persistent(self.pop(tuple))))
        elif opcode in STEPS:
            STEPS[opcode](self)
        elif opcode not in ("PROTO", "FRAME"):
            raise Malformed(f"wants the pickle opcode {opcode}, which no weights need: refused, nothing was run")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, kind: type = object) -> Any:
        value = self.top(kind)
        self.stack.pop()
        return value

    def top(self, kind: type) -> Any:
        if not self.stack:
            _damaged("a value", "none")
        if kind is not object and type(self.stack[-1]) is not kind:
            _damaged(kind.__name__, type(self.stack[-1]).__name__)
        return self.stack[-1]

    def pop_marked(self) -> list[Any]:
        """The items since the last mark."""
        if not self.marked:
            _damaged("a mark", "none")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def kept(self, named: Name | Storage) -> Name | Storage:
        if isinstance(named, Storage) and self.storages.setdefault(named.key, named) != named:
            _damaged("one storage under a key", "two")
        return named

    def wrap(self, num_items: int) -> None:
        self.push(tuple([self.pop() for _ in range(num_items)][::-1]))

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2 or not all(type(key) in (str, int) for key in items[::2]):
            _damaged("keys that are texts or numbers", "others")
        self.top(dict).update(zip(items[::2], items[1::2], strict=True))

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def call(self) -> None:
        args, name = self.pop(tuple), self.pop(Name)
        if name.text not in CALLS:
            raise Malformed(f"wants to call {shown(name.text)}: refused, nothing was run")
        self.push(CALLS[name.text](args))

    def make(self) -> None:
        args, name = self.pop(tuple), self.pop(Name)
        if name.text not in CLASSES or args:
            raise Malformed(f"wants to make {shown(name.text)} with {len(args)} arguments: refused, nothing was run")
        self.push(Record())

    def build(self) -> None:
        state = self.pop()
        if type(self.top(object)) is Record:
            self.stack[-1].state = typed(state, dict)
        else:
            # attributes of a dict, which is what a state dict keeps its versions in
            self.top(dict)


def _damaged(wanted: str, found: str) -> NoReturn:
    raise Malformed(f"is damaged: its pickle wants {wanted}, found {found}; download it again")


NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"}
PUSHED = NUMBERS | TEXTS
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
FRESH = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}  # a set is never asked what it holds
STEPS: dict[str, Callable[[Machine], None]] = {
    "TUPLE": lambda machine: machine.push(tuple(machine.pop_marked())),
    "TUPLE1": lambda machine: machine.wrap(1),
    "TUPLE2": lambda machine: machine.wrap(2),
    "TUPLE3": lambda machine: machine.wrap(3),
    "APPEND": lambda machine: machine.extend([machine.pop()]),
    "APPENDS": lambda machine: machine.extend(machine.pop_marked()),
    "ADDITEMS": lambda machine: machine.extend(machine.pop_marked()),
    "SETITEM": lambda machine: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine: machine.set_items(machine.pop_marked()),
    "REDUCE": Machine.call,
    "NEWOBJ": Machine.make,
    "BUILD": Machine.build,
}


def _allowed(name: str) -> Name:
    if name.startswith("torch.") and name.endswith("Storage") and name not in DTYPES:
        raise Malformed(f"wants values of {shown(name)}; weights are of {', '.join(DTYPES)}: refused")
    if name not in CLASSES and name not in CALLS and name not in DTYPES:
        raise Malformed(f"wants {shown(name)}: refused, nothing was run")
    return Name(name)


def _persistent(args: tuple) -> Name | Storage:
    """The two kinds that torch writes: a class with its source (legacy), and a storage."""
    match args:
        case ("module", Name() as name, *_):
            return name
        case ("storage", Name(dtype), str(key), str(), int(num_values), *view) if dtype in DTYPES and num_values >= 0:
            if any(part is not None for part in view):
                raise Malformed("shares storages as torch 0.3 did: refused; save it again with a newer torch")
            return Storage(key, DTYPES[dtype], num_values)
    kind = args[0] if args and isinstance(args[0], str) else "nothing"
    raise Malformed(f"wants a persistent object that is neither a module nor a storage: {shown(kind)}: refused")


def _rebuild_tensor(args: tuple) -> TensorSpec:
    match args:
        case (Storage() as storage, int(offset), tuple(shape), tuple(stride), *_) if len(shape) == len(stride):
            pass
        case _:
            _damaged("a tensor of storage, offset, shape and stride", "something else")
    numbers = (offset, *shape, *stride)
    if len(shape) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in numbers) or 0 in shape:
        _damaged(f"at most {MAX_DIMS} sizes from 1 up", f"{len(shape)}, or others")
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if offset + span > storage.num_values or span != prod(shape):
        _damaged(f"a tensor within the {storage.num_values} values of its storage, without gaps", "one that is not")
    return TensorSpec(storage, offset, shape, stride)


def _rebuild_parameter(args: tuple) -> TensorSpec:
    return typed(args[0] if args else None, TensorSpec)


def _ordered_dict(args: tuple) -> dict:
    """Empty in what torch writes; Python 2 wrote a list of pairs."""
    found: dict = {}
    for pair in typed(args[0], list) if args else ():
        if type(pair) not in (list, tuple) or len(pair) != 2 or type(pair[0]) is not str:
            _damaged("pairs of a name and a value", "others")
        found[pair[0]] = pair[1]
    return found


def _ignored(args: tuple) -> None:
    """Of no use here: on which device a layer was, which hooks it had, how far a schedule was."""


def _dtype(args: tuple) -> dict:
    """Of a number of NumPy, which is not read; a dict, for it is then given a state."""
    return {}


CALLS: dict[str, Callable[[tuple], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.device": _ignored,
    "builtins.set": _ignored,
    "__builtin__.set": _ignored,
    # learning rates of a trainer's optimizer
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _ignored,
    "numpy._core.multiarray.scalar": _ignored,
    "_codecs.encode": _ignored,
}


def typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise Malformed(f"is damaged: wants {kind.__name__}, found {type(value).__name__}; download it again")
    return value


def shown(text: Any) -> str:
    """Safe to print, and not long."""
    shown = ascii(text)[1:-1] if isinstance(text, str) else type(text).__name__
    return shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "..."
