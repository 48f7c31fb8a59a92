"""The command `fastbeit`: its verbs, which are in `verbs/`, and their errors."""

import difflib
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from fastbeit import __version__
from fastbeit.errors import DONE, USAGE, RunError
from fastbeit.process import keep_outputs_harmless, leave
from fastbeit.verbs.data import data_verb, index_verb, shard_verb, tokenize_verb
from fastbeit.verbs.tokenizer import tokenizer_verb
from fastbeit.verbs.training import demo_verb, doctor_verb, finetune_verb, plan_verb, pretrain_verb, report_verb
from fastbeit.verbs.weights import convert_verb, export_verb, features_verb, predict_verb, probe_verb

HELP = f"""fastbeit {__version__}: pre-train BEiT on unlabelled images

  fastbeit demo [--data DIR]                       photos to pictures of what was learnt, in minutes, on a CPU
  fastbeit index SOURCE -o images.idx              list the images of a folder, of shards, of tables
  fastbeit index check images.idx                  decode them all, list the bad ones
  fastbeit shard SOURCE -o shards/                 copy them into tar shards of small JPEGs, which load faster
  fastbeit tokenizer train --data images.idx -o DIR
                                                   train a dVAE of your own on them
  fastbeit tokenizer fetch -o DIR                  or take OpenAI's, of the paper: downloaded,
  fastbeit tokenizer import FILE [FILE] -o DIR     or from weights that you have; nothing in them is run
  fastbeit tokenize CONFIG data.num_crops=K        tokens of K crops an image ahead of time; pretrain data.tokens=tokens
  fastbeit data show CONFIG [-o sheet.png]         a picture of what training sees: crops, token views, masks
  fastbeit pretrain CONFIG [key=value ...]         pre-train; the same command again continues. CONFIG: a YAML file, or
                                                   beit_base_in1k, beit_small or demo; data.index=/my/photos
  fastbeit finetune CONFIG init=RUN [key=value ...]
                                                   classify labelled images, from a pre-training or from scratch
  fastbeit plan CONFIG --gpus N --gpu NAME         memory, hours, disk and cores that it will take, on any computer
  fastbeit report RUN [--tokenizer DIR]            pictures and the HTML page of a run
  fastbeit convert FILE -o DIR                     weights of others: the authors', timm's, Hugging Face's, DeiT's
  fastbeit export RUN --to timm|hf|unilm|onnx -o DIR
                                                   a run for the loaders of others, with a model card
  fastbeit features MODEL SOURCE -o FILE           what a model makes of images, as safetensors
  fastbeit predict MODEL SOURCE [--json FILE]      their classes, by a fine-tuned model
  fastbeit probe MODEL --data SOURCE --val SOURCE  linear probe and k-NN on the frozen features of each block
  fastbeit doctor [CONFIG] [key=value ...]         what of this machine a run can use, and whether each kernel is right
  fastbeit doctor --tune [CONFIG] [key=value ...]  and what is fastest on its card, which runs then take

`fastbeit VERB --help` says more; `fastbeit --version` prints the version. On several GPUs:
  deepspeed --module fastbeit pretrain CONFIG [key=value ...]
  torchrun --nproc-per-node 8 -m fastbeit pretrain CONFIG [key=value ...]
  srun --ntasks 8 --gpus 8 fastbeit pretrain CONFIG [key=value ...]

Exit codes: 0 done, 2 usage or config, 65 too many bad images, 66 data missing, 73 and 74 cannot write, 75 stopped and
saved (run the same command again), 78 no usable checkpoint, 1 anything else."""


def run() -> NoReturn:
    """The command, as a process of its own."""
    keep_outputs_harmless()
    try:
        code = main()
    except SystemExit as end:  # of argparse
        code = end.code if isinstance(end.code, int) else DONE if end.code is None else 1
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    while args and args[0].startswith("--local_rank"):
        # the deepspeed launcher puts it before the verb; ranks are read from the environment
        args.pop(0)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return DONE if args else USAGE
    if args[0] == "--version":
        print(__version__)
        return DONE
    verb, *rest = args
    if verb not in VERBS:
        print(f"fastbeit: no verb '{verb}'{_meant(verb)} There are {', '.join(VERBS)}", file=sys.stderr)
        return USAGE
    try:
        return VERBS[verb](rest)
    except RunError as err:
        lines = str(err).splitlines()
        print("\n".join(f"fastbeit {verb}: {line}" for line in lines), file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        print(f"fastbeit {verb}: interrupted", file=sys.stderr)
        return 130


def _meant(word: str) -> str:
    """The verbs nearest to a word, by the last part of their names."""
    ends = {name.split()[-1]: name for name in (*VERBS, *PARTS)}
    near = [ends[end] for end in difflib.get_close_matches(word, ends, n=2)]
    return f"; did you mean {' or '.join(near)}?" if near else "."


PARTS = "index check", "data show", "tokenizer train", "tokenizer import", "tokenizer fetch"  # of verbs
VERBS: dict[str, Callable[[list[str]], int]] = {
    "demo": demo_verb,
    "index": index_verb,
    "shard": shard_verb,
    "tokenizer": tokenizer_verb,
    "tokenize": tokenize_verb,
    "data": data_verb,
    "pretrain": pretrain_verb,
    "finetune": finetune_verb,
    "plan": plan_verb,
    "report": report_verb,
    "convert": convert_verb,
    "export": export_verb,
    "features": features_verb,
    "predict": predict_verb,
    "probe": probe_verb,
    "doctor": doctor_verb,
}
