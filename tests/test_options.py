"""cli/options.py and cli/grammar.py: nanoGPT's grammar, its config files, and every message word for word."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from base.errors import UserError
from cli import options
from cli.grammar import help_text, parse, parse_command
from cli.options import (
    EntryOptions,
    EvalOptions,
    InspectOptions,
    MergeOptions,
    RunOptions,
    SampleOptions,
    SplitOptions,
    TrainOptions,
    VerifyOptions,
    as_dict,
    option,
)

ROOT = Path(options.__file__).parent.parent
RUN_ENTRIES = (SampleOptions, TrainOptions, EvalOptions)
COMMANDS = {"split": SplitOptions, "merge": MergeOptions, "verify": VerifyOptions, "inspect": InspectOptions}
EVERY_CLASS = (*RUN_ENTRIES, *COMMANDS.values())


def train(*argv):
    return parse(TrainOptions, [str(word) for word in argv], "train_tp.py")


def sample(*argv):
    return parse(SampleOptions, [str(word) for word in argv], "sample_tp.py")


def message(call, *argv):
    with pytest.raises(UserError) as caught:
        call(*argv)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def config(tmp_path):
    """Writes a config file and returns its path."""
    def write(text, name="config.py"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path
    return write


class OddOptions(EntryOptions):
    """Types that no entry has yet."""

    limit: int | None = option(None, "an optional number", low=1)
    name: str | None = option("x", "an optional name")
    names: list[str] = option([], "several of a choice", ("a", "b"))


# --- command line -----------------------------------------------------------------------------------------------------

def test_the_help_names_the_second_name_of_an_option() -> None:
    text = help_text(SampleOptions, "sample_tp.py")
    (line,) = [line for line in text.splitlines() if line.startswith("  --start=")]
    assert line.endswith(", or --prompt")


def test_nothing_given_means_the_defaults():
    assert train() == TrainOptions()
    assert sample().start == ["\n"]


def test_nanogpt_defaults():
    options = TrainOptions()
    assert (options.n_layer, options.n_head, options.n_embd, options.block_size) == (12, 12, 768, 1024)
    assert (options.batch_size, options.gradient_accumulation_steps) == (12, 40)
    assert (options.learning_rate, options.min_lr, options.beta1, options.beta2) == (6e-4, 6e-5, 0.9, 0.95)
    assert (options.max_iters, options.lr_decay_iters, options.warmup_iters) == (600000, 600000, 2000)
    assert (sample().seed, sample().temperature, sample().top_k, sample().max_new_tokens) == (1337, 0.8, 200, 200)


@pytest.mark.parametrize("words", [["--batch_size=3"], ["--batch_size", "3"], ["--batch-size=3"], ["--batch-size", "3"],
                                   ["--batch_size=3.0"], ["--batch_size=5", "--batch_size=3"]])
def test_ways_to_give_a_value(words):
    assert train(*words).batch_size == 3


@pytest.mark.parametrize(("word", "value"), [("True", True), ("true", True), ("1", True),
                                             ("False", False), ("false", False), ("0", False)])
def test_bools(word, value):
    assert train(f"--eval_only={word}").eval_only is value
    assert train("--eval_only", word).eval_only is value


def test_a_bare_flag_is_true_and_eats_nothing_else(config):
    path = config("batch_size = 3\n")
    assert train("--eval_only").eval_only is True
    assert train("--eval_only", "--batch_size=3") == train("--batch_size=3", "--eval_only=True")
    assert train("--eval_only", path) == train("--batch_size=3", "--eval_only=True")


def test_numbers():
    options = train("--max_iters=1e3", "--learning_rate=1", "--weight_decay=1e-2", "--grad_clip", "0")
    assert (options.max_iters, options.learning_rate, options.weight_decay, options.grad_clip) == (1000, 1.0, 0.01, 0.0)
    assert type(options.max_iters) is int and type(options.learning_rate) is float and type(options.grad_clip) is float


def test_text_is_taken_as_it_is():
    assert sample("--stop=a=b=").stop == "a=b="
    assert sample("--stop=--x").stop == "--x"
    assert sample("--stop=").stop == ""
    assert sample("--stop", "-1").stop == "-1"
    assert sample("--stop=3").stop == "3"
    assert sample("--stop= 'q' ").stop == " 'q' "
    assert sample("--stop=None").stop == "None"


def test_start_may_be_given_several_times():
    assert sample("--start=a", "--start", "FILE:b=c.txt", "--start=").start == ["a", "FILE:b=c.txt", ""]


def test_optional_and_list_types():
    assert parse(OddOptions, ["--limit=3", "--name=None"], "odd.py") == OddOptions(limit=3, name=None)
    assert parse(OddOptions, ["--limit=3", "--limit=None"], "odd.py").limit is None
    assert parse(OddOptions, ["--names=a", "--names=b"], "odd.py").names == ["a", "b"]
    with pytest.raises(UserError, match=r"^--names must be a or b, got 'c'$"):
        parse(OddOptions, ["--names=a", "--names=c"], "odd.py")
    with pytest.raises(UserError, match="^--limit must be at least 1, got 0$"):
        parse(OddOptions, ["--limit=0"], "odd.py")


def test_a_type_that_no_word_can_be_read_as_is_a_mistake_of_ours():
    class Wrong(EntryOptions):
        size: complex = option(1j, "no word says this")

    with pytest.raises(TypeError, match="option size has a type that options cannot have"):
        parse(Wrong, [], "wrong.py")


@pytest.mark.parametrize(("words", "text"), [
    (["--eval_intervl=5"],
     "unknown option --eval_intervl. Did you mean --eval_interval? (train_tp.py --help lists all)"),
    (["--eval-intervl=5"],
     "unknown option --eval-intervl. Did you mean --eval_interval? (train_tp.py --help lists all)"),
    (["--qqq"], "unknown option --qqq (train_tp.py --help lists all)"),
    (["--"], "unknown option -- (train_tp.py --help lists all)"),
    (["--no-progress"], "unknown option --no-progress. Did you mean --progress=False? (train_tp.py --help lists all)"),
    (["--dropout=high"], "--dropout expects a number, got 'high'"),
    (["--dropout", "high"], "--dropout expects a number, got 'high'"),
    (["--dropout="], "--dropout expects a number, got ''"),
    (["--dropout"], "--dropout expects a number, got nothing"),
    (["--dropout=True"], "--dropout expects a number, got 'True'"),
    (["--dropout=nan"], "--dropout expects a finite number, got nan"),
    (["--grad_clip=inf"], "--grad_clip expects a finite number, got inf"),
    (["--batch_size=2.5"], "--batch_size expects a whole number, got 2.5"),
    (["--batch_size=nan"], "--batch_size expects a whole number, got nan"),
    (["--batch_size=inf"], "--batch_size expects a whole number, got inf"),
    (["--batch_size=None"], "--batch_size expects a whole number, got 'None'"),
    (["--eval_only=yes"], "--eval_only expects True or False, got 'yes'"),
    (["--eval_only="], "--eval_only expects True or False, got ''"),
    (["--out_dir"], "--out_dir expects text, got nothing"),
    (["--out_dir", "--tp=2"], "--out_dir expects text, got another option: --tp=2 "
                              "(a value that starts with -- is written --out_dir=--tp=2)"),
    (["--dtype=fp16"], "--dtype must be auto, float32, bfloat16 or float16, got 'fp16'"),
    (["--backend=mpi"], "--backend must be nccl or gloo, got 'mpi'"),
    (["--batch_size=0"], "--batch_size must be at least 1, got 0"),
    (["--dropout=1.5"], "--dropout must be at most 1, got 1.5"),
    (["--comm_timeout=0"], "--comm_timeout must be above 0, got 0.0"),
    (["--beta2=1"], "--beta2 must be below 1, got 1.0"),
    (["batch_size=8"], "'batch_size=8' is neither a config file (*.py) nor an option. Did you mean --batch_size=8? "
                       "(train_tp.py --help lists all)"),
    (["-batch-size", "8"], "'-batch-size' is neither a config file (*.py) nor an option. Did you mean --batch_size? "
                           "(train_tp.py --help lists all)"),
    (["no_progress=True"], "'no_progress=True' is neither a config file (*.py) nor an option. "
                           "Did you mean --progress=False? (train_tp.py --help lists all)"),
    (["out_dir=x.py"], "'out_dir=x.py' is neither a config file (*.py) nor an option. Did you mean --out_dir=x.py? "
                       "(train_tp.py --help lists all)"),
    (["world"], "'world' is neither a config file (*.py) nor an option (train_tp.py --help lists all)"),
    ([""], "'' is neither a config file (*.py) nor an option (train_tp.py --help lists all)"),
])
def test_messages(words, text):
    assert message(train, *words) == text


def test_messages_of_sampling():
    assert message(sample, "--temperature=-1") == "--temperature must be at least 0, got -1.0"
    assert message(sample, "--top_p=0") == "--top_p must be above 0, got 0.0"
    assert message(sample, "--overflow=crop") == "--overflow must be slide, stop or error, got 'crop'"
    assert message(sample, "--start", "Hello", "there").startswith("'there' is neither a config file")


@pytest.mark.parametrize("word", ["--dropout=1" + "0" * 400, "--batch_size=" + "9" * 5000, "--seed=-1",
                                  "--seed=1" + "0" * 30])
def test_absurd_numbers_are_refused(word):
    assert message(train, word).startswith(word.partition("=")[0])


def test_required_options():
    with pytest.raises(UserError) as caught:
        parse(SplitOptions, ["--init_from=gpt2"], "shard_checkpoint.py split")
    assert str(caught.value) == (
        "--out is required: shard directory to write (shard_checkpoint.py split --help lists all)")
    assert parse(SplitOptions, ["--init_from=gpt2", "--out=x"], "p").tp == 2


def test_backend_is_another_name_for_comm():
    assert train("--backend=gloo").comm == "gloo"
    assert train("--backend=nccl", "--comm=gloo").comm == "gloo"
    assert train().comm == "auto"


def test_options_are_frozen_and_share_nothing():
    first, second = SampleOptions(), SampleOptions()
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.seed = 1  # type: ignore[misc]
    first.start.append("x")
    assert second.start == SampleOptions().start == ["\n"]


def test_as_dict_is_plain_and_a_copy():
    given = sample("--start=a")
    plain = as_dict(given)
    assert json.loads(json.dumps(plain)) == plain
    plain["start"].append("b")
    assert given.start == ["a"]
    assert SampleOptions(**as_dict(given)) == given


# --- config files -----------------------------------------------------------------------------------------------------

def test_config_files_and_words_count_in_order(config):
    one, two = config("batch_size = 1\ntp = 7\n", "one.py"), config("batch_size = 2\n", "two.py")
    assert train(one).batch_size == 1
    assert (train(one, two).batch_size, train(one, two).tp) == (2, 7)
    assert train(two, one).batch_size == 1
    assert train(one, "--batch_size=9", two).batch_size == 2
    assert train(one, two, "--batch_size=9").batch_size == 9


def test_a_fine_tuning_config_in_nanogpts_manner(config):
    path = config("""
import time

out_dir = 'out-poems'
eval_interval = 7
eval_iters = 40
wandb_log = False # sometimes
wandb_project = 'poems'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'poems'
init_from = 'gpt2-xl' # the big one
always_save_checkpoint = False

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
""")
    options = train(path)
    assert options.wandb_run_name.startswith("ft-1")
    assert (options.init_from, options.dataset, options.eval_interval) == ("gpt2-xl", "poems", 7)
    assert (options.learning_rate, options.decay_lr, options.always_save_checkpoint) == (3e-5, False, False)


def test_a_pretraining_config_in_nanogpts_manner(config):
    options = train(config("""
# 12 * 1024 * 5 * 8
wandb_log = True
wandb_run_name='gpt2-124M'
batch_size = 12
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = max_iters
weight_decay = 1e-1
backend = 'gloo'
device = 'cpu'
dtype = 'float32'
compile = False
"""))
    assert (options.gradient_accumulation_steps, options.weight_decay, options.lr_decay_iters) == (40, 0.1, 600000)
    assert (options.comm, options.device, options.dtype, options.compile) == ("gloo", "cpu", "float32", False)


def test_an_evaluation_config_in_nanogpts_manner(config):
    options = train(config("batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\n"
                           "init_from = 'gpt2-medium'\n"))
    assert (options.batch_size, options.eval_only, options.init_from) == (8, True, "gpt2-medium")


def test_what_a_config_file_imports_defines_or_underscores_is_no_setting(config):
    options = train(config("""
import math, os.path as p
from math import sqrt
from collections import OrderedDict
def scaled(x): return x * _factor
class Helper: pass
square = lambda x: x * x
_factor = 3
batch_size: int = scaled(4)
dropout = 1 - sqrt(0.25)
"""))
    assert (options.batch_size, options.dropout) == (12, 0.5)


def test_a_config_file_knows_its_place_and_gets_a_namespace_of_its_own(config):
    one = config("_seen = 1\nimport os\nout_dir = os.path.dirname(__file__) + __name__\n", "one.py")
    assert train(one).out_dir == f"{one.parent}config"
    two = config("batch_size = _seen\n", "two.py")
    assert message(train, one, two) == f"{two} line 1: NameError: name '_seen' is not defined"
    assert not hasattr(options, "_seen")


@pytest.mark.parametrize(("line", "name", "value"), [
    ("max_iters = 1e3", "max_iters", 1000),
    ("learning_rate = 1", "learning_rate", 1.0),
    ("eval_only = 1", "eval_only", True),
    ("wandb_run_name = 124", "wandb_run_name", "124"),
    ("from pathlib import Path\nout_dir = Path('a') / 'b'", "out_dir", str(Path("a/b"))),
    ("from numpy import int64\nbatch_size = int64(4)", "batch_size", 4),
    ("from numpy import float32\ndropout = float32(0.5)", "dropout", 0.5),
])
def test_types_in_a_config_file(config, line, name, value):
    if "numpy" in line:
        pytest.importorskip("numpy")
    found = getattr(train(config(line)), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("line", "text"), [
    ("eval_intervl = 5", "unknown option eval_intervl. Did you mean eval_interval? (train_tp.py --help lists all)"),
    ("qqq = 5", "unknown option qqq (train_tp.py --help lists all; names of the file's own start with _)"),
    ("dropout = 'high'", "dropout expects a number, got 'high'"),
    ("dropout = '0.1'", "dropout expects a number, got '0.1'"),
    ("dropout = None", "dropout expects a number, got None"),
    ("dropout = float('nan')", "dropout expects a finite number, got nan"),
    ("dropout = 10**400", f"dropout expects a finite number, got 1{'0' * 76}..."),
    ("dropout = 10**5000", "dropout expects a finite number, got a number too long to print"),
    ("class _Two:\n    def __repr__(self): return 'a\\nb'\ndropout = _Two()", "dropout expects a number, got a b"),
    ("dropout = len", "dropout expects a number, got <built-in function len>"),
    ("batch_size = True", "batch_size expects a whole number, got True"),
    ("batch_size = 1.5", "batch_size expects a whole number, got 1.5"),
    ("batch_size = -1", "batch_size must be at least 1, got -1"),
    ("eval_only = 'yes'", "eval_only expects True or False, got 'yes'"),
    ("eval_only = 2", "eval_only expects True or False, got 2"),
    ("out_dir = ['a']", "out_dir expects text, got ['a']"),
    ("dtype = 'half'", "dtype must be auto, float32, bfloat16 or float16, got 'half'"),
])
def test_wrong_values_in_a_config_file(config, line, text):
    path = config(line)
    assert message(train, path) == f"{path}: {text}"


@pytest.mark.parametrize(("text", "problem"), [
    ("batch_size = 4\n\n1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
    ("def f():\n    return g\n\nbatch_size = f()\n", "line 2: NameError: name 'g' is not defined"),
    ("import json\njson.loads('')\n", "line 2: JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
    ("raise ValueError('two\\nlines')\n", "line 1: ValueError: two lines"),
    ("import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),
    ("open('/no/such/file')\n", "line 1: FileNotFoundError: [Errno 2] No such file or directory: '/no/such/file'"),
    ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ("batch_size = 4\nif True\n", "line 2: SyntaxError: expected ':'"),
    ("if True:\nbatch_size = 4\n",
     "line 2: IndentationError: expected an indented block after 'if' statement on line 1"),
])
def test_config_files_that_fail(config, text, problem):
    path = config(text)
    assert message(train, path) == f"{path} {problem}"


def test_config_files_that_are_not_text(tmp_path):
    path = tmp_path / "config.py"
    path.write_bytes(b"out_dir = '\xff'\n")
    assert message(train, path).startswith(f"{path} line 1: SyntaxError: ")
    path.write_bytes(b"batch_size = 4\0\n")
    assert str(path) in message(train, path)
    path.write_bytes("\ufeffout_dir = 'ü'\n".encode())
    assert train(path).out_dir == "ü"


def test_missing_config_files(config, tmp_path, monkeypatch):
    path = config("", "train_poems.py")
    wrong = tmp_path / "train_poem.py"
    assert message(train, wrong) == f"no config file {wrong}. Did you mean {path}?"
    monkeypatch.chdir(ROOT)
    assert message(train, "config/train_gpt2.py") == (
        "no config file config/train_gpt2.py. Did you mean configs/train_gpt2.py?")
    assert message(train, "zzz/qqqqqqqqqqqqqqq.py") == "no config file zzz/qqqqqqqqqqqqqqq.py"
    (tmp_path / "folder.py").mkdir()
    assert message(train, tmp_path / "folder.py").startswith("no config file ")
    assert message(train, ROOT / "README.md").endswith(
        "is neither a config file (*.py) nor an option (train_tp.py --help lists all)")


def test_start_in_config_files_and_words(config):
    one, many = config("start = 'a'\n", "one.py"), config("start = ('b', 'c')\n", "many.py")
    assert sample(one).start == ["a"]
    assert sample(one, many).start == ["b", "c"]
    assert sample(many, "--start=x", "--start=y").start == ["x", "y"]
    assert sample("--start=x", many).start == ["b", "c"]
    assert sample("--start=x", many, "--start=y").start == ["y"]
    empty, wrong = config("start = []\n", "empty.py"), config("start = ['a', None]\n", "wrong.py")
    assert message(sample, empty) == f"{empty}: start expects at least one value, got []"
    assert message(sample, wrong) == f"{wrong}: start expects text, got None"


def test_required_options_may_come_from_a_config_file(config):
    path = config("init_from = 'gpt2'\nout = 'shards'\ntp = 4\n")
    assert parse(SplitOptions, [str(path)], "p") == SplitOptions(init_from="gpt2", out="shards", tp=4)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_our_own_config_files(path):
    assert train(path) != TrainOptions()
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert f"train_tp.py configs/{path.name}" in path.read_text(encoding="utf-8")


def test_the_figures_in_our_own_config_files():
    gpt2, baby, demo = (train(ROOT / "configs" / name)
                        for name in ("train_gpt2.py", "train_shakespeare_char.py", "demo.py"))
    assert gpt2.batch_size * gpt2.block_size * gpt2.gradient_accumulation_steps == 491520
    assert math.isclose(491520 * gpt2.max_iters, 300e9, rel_tol=0.02)
    assert baby.batch_size * baby.block_size * baby.gradient_accumulation_steps == 16384
    assert demo.max_iters == demo.lr_decay_iters and demo.n_embd % demo.n_head == 0


# --- commands ---------------------------------------------------------------------------------------------------------

def test_commands():
    argv = ["split", "--init_from=gpt2", "--tp", "4", "--out=x", "--force"]
    assert parse_command(COMMANDS, argv, "shard_checkpoint.py") == (
        "split", SplitOptions(init_from="gpt2", tp=4, out="x", force=True))
    assert parse_command(COMMANDS, ["verify", "--shards=x"], "p") == ("verify", VerifyOptions(shards="x"))


@pytest.mark.parametrize(("words", "text"), [
    ([],
     "shard_checkpoint.py needs a command: split, merge, verify or inspect (shard_checkpoint.py --help tells more)"),
    (["splt"], "unknown command 'splt'. Did you mean split? The commands are split, merge, verify and inspect "
               "(shard_checkpoint.py --help tells more)"),
    (["qqq"], "unknown command 'qqq'. The commands are split, merge, verify and inspect "
              "(shard_checkpoint.py --help tells more)"),
    (["--tp=2", "split"], "the command comes first: shard_checkpoint.py split|merge|verify|inspect --key=value ..., "
                          "got '--tp=2'"),
    (["verify", "--shard=x"], "unknown option --shard. Did you mean --shards? "
                              "(shard_checkpoint.py verify --help lists all)"),
    (["verify"], "--shards is required: shard directory to check (shard_checkpoint.py verify --help lists all)"),
    (["split", "--tp=0"], "--tp must be at least 1, got 0"),
    (["merge", "--format=gguf"], "--format must be hf or nanogpt, got 'gguf'"),
])
def test_messages_of_commands(words, text):
    assert message(parse_command, COMMANDS, words, "shard_checkpoint.py") == text


# --- help -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_every_key_has_one_line_of_help(cls):
    for field in dataclasses.fields(cls):
        text = field.metadata["help"]
        assert text and "\n" not in text and not text.endswith("."), field.name
    lines = help_text(cls, "prog.py").splitlines()
    assert max(map(len, lines)) <= 120
    shown = [line for line in lines if line.startswith("  --")]
    assert sorted(line.split("=")[0].strip(" -") for line in shown) == sorted(f.name for f in dataclasses.fields(cls))
    width = len(shown[0]) - len(shown[0].split("  ", 2)[2].lstrip())
    assert all(line[width - 2:width] == "  " and line[width] != " " for line in shown)


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_defaults_pass_their_own_checks(cls):
    words = [f"--{name}={item}" for name, value in as_dict(cls()).items()
             for item in (value if isinstance(value, list) else [value])]
    required = [f"--{field.name}=x" for field in dataclasses.fields(cls) if field.metadata["required"]]
    assert parse(cls, words + required, "p") == parse(cls, required, "p")


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help(capsys, word):
    with pytest.raises(SystemExit) as caught:
        train("--batch_size=0", word)
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: torchrun --standalone --nproc_per_node=N train_tp.py [config.py ...] "
                              "[--key=value ...]\n\nTrain from scratch")
    assert "\n  --tp=0 " in printed and "\n  --learning_rate=0.0006 " in printed and "\n  --report='' " in printed
    assert printed.index("--progress=") < printed.index("--device=") < printed.index("--debug=")


def test_help_shows_choices_lists_and_required_options():
    assert "--start='\\n' " in help_text(SampleOptions, "p")
    assert "transport of the collectives (auto | nccl | gloo | shm)" in help_text(SampleOptions, "p")
    assert "where comm=auto (nccl | gloo)" in help_text(TrainOptions, "p")
    assert "--out=... " in help_text(SplitOptions, "p") and "to write (required)" in help_text(SplitOptions, "p")


def test_help_of_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command(COMMANDS, ["--help"], "shard_checkpoint.py")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python shard_checkpoint.py split|merge|verify|inspect [config.py ...]")
    for name, cls in COMMANDS.items():
        sentence = re.split("[:.]", cls.__doc__ or "")[0]  # no more of it than a line holds
        assert f"  {name:<7}  {sentence}\n" in printed
    with pytest.raises(SystemExit):
        parse_command(COMMANDS, ["split", "--help"], "shard_checkpoint.py")
    assert capsys.readouterr().out.startswith("usage: python shard_checkpoint.py split [config.py ...]")


def test_run_entries_share_the_common_options():
    common = {field.name for field in dataclasses.fields(RunOptions)}
    assert {"device", "dtype", "comm", "compile", "seed", "report", "debug"} <= common
    for cls in RUN_ENTRIES:
        assert as_dict(cls()).items() >= as_dict(RunOptions()).items()


def test_options_needs_nothing_but_the_standard_library():
    code = ("import sys; import cli.grammar; "
            "print(sorted({m.partition('.')[0] for m in sys.modules} - sys.stdlib_module_names - {'__main__'}))")
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['base', 'cli']", done.stderr


def test_start_has_a_second_name_that_torchrun_does_not_take_for_its_own():
    assert parse(SampleOptions, ["--prompt=a", "--start=b", "--prompt", "c"], "sample_tp.py").start == ["a", "b", "c"]


# --- paths ------------------------------------------------------------------------------------------------------------

def every_class():
    return [cls for name, cls in vars(options).items() if name.endswith("Options")]


def test_a_home_directory_is_expanded_wherever_an_option_is_a_path(monkeypatch):
    """In every command, typed or in a config file, and nowhere else."""
    monkeypatch.setenv("HOME", "/home/ada")
    for cls in every_class():
        for field in dataclasses.fields(cls):
            if field.type not in ("str", str) or field.metadata["choices"]:
                continue
            made = parse(cls, [*required(cls), f"--{field.name}=~/x"], "prog.py")
            expected = "/home/ada/x" if options.PATHS.get(field.name, "").startswith("^") else "~/x"
            expected = "~/x" if field.name == "prompt" else expected
            assert getattr(made, field.name) == expected, (cls, field.name)


def required(cls):
    return [f"--{field.name}=x" for field in dataclasses.fields(cls) if field.metadata["required"]]


def test_names_that_are_paths_are_options_and_what_looks_like_one_is_a_path():
    fields = {field.name: field for cls in every_class() for field in dataclasses.fields(cls)}
    assert options.PATHS.keys() <= fields.keys()
    words = re.compile(r"director|\bfile\b|FILE|path|PNG|weights: hub|weights as in")
    found = {name for name, field in fields.items() if words.search(field.metadata["help"])}
    assert found - options.PATHS.keys() == set()


def test_paths_within_a_prompt(monkeypatch, config):
    monkeypatch.setenv("HOME", "/home/ada")
    start = sample("--prompt=FILE:~/p.txt", "--prompt=PROMPTS:~/q.txt", "--prompt=~/r", "--prompt=a FILE:~").start
    assert start == ["FILE:/home/ada/p.txt", "PROMPTS:/home/ada/q.txt", "~/r", "a FILE:~"]
    path = config('out_dir = "~/run"\ndata_dir = "~no_such_user/x"\nwandb_project = "~/x"\n')
    made = train(path, "--report=x/~")
    assert made.out_dir == "/home/ada/run" and made.data_dir == "~no_such_user/x"
    assert (made.wandb_project, made.report) == ("~/x", "x/~")


# --- one config file for several commands -------------------------------------------------------------------------------

NANOGPTS = {  # what nanoGPT's seven config files set
    "eval_gpt2": "batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\ninit_from = 'gpt2'\n",
    "finetune_shakespeare": """
import time
out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
""",
    "train_gpt2": """
wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""",
    "train_shakespeare_char": """
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
""",
} | {f"eval_gpt2_{size}": f"batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\ninit_from = 'gpt2-{size}'\n"
     for size in ("medium", "large", "xl")}


@pytest.mark.parametrize("name", NANOGPTS)
def test_nanogpts_config_files_with_every_command(config, capsys, name):
    path = config(NANOGPTS[name], f"{name}.py")
    assert train(path) != TrainOptions() and capsys.readouterr().err == ""
    names = list(re.findall(r"^(\w+) ?=", NANOGPTS[name], re.M))
    for cls, prog in ((SampleOptions, "sample_tp.py"), (EvalOptions, "eval_tp.py")):
        made = as_dict(parse(cls, [str(path)], prog))
        left = ", ".join(word for word in names if word not in made)
        said = f"{prog}: {path} sets options of other commands, which are not used here: {left}\n"
        assert capsys.readouterr().err == said
        assert made["batch_size"] == train(path).batch_size
        if "out_dir" in names:
            assert made["out_dir"] == train(path).out_dir


def test_other_commands_options_in_a_config_file(config, capsys):
    """A file for sampling given to training, one for training given to split; what is of no command is still a mistake."""
    path = config("num_samples = 3\nprompt = 'a'\ntp = 2\nout = 'x'\n")
    assert train(path).tp == 2
    assert capsys.readouterr().err.endswith("which are not used here: num_samples, prompt, out\n")
    made = parse(SplitOptions, [str(path), "--init_from=gpt2"], "shard_checkpoint.py split")
    assert (made.tp, made.out) == (2, "x") and "num_samples, prompt\n" in capsys.readouterr().err
    assert sample(path).start == ["a"]  # --prompt's other name
    assert message(sample, "--learning_rate=3").startswith("unknown option --learning_rate")
    assert message(sample, config("learning_rat = 3")).endswith("unknown option learning_rat (sample_tp.py --help lists all; "
                                                                "names of the file's own start with _)")
