"""Opens the folders that a file of jobs lists, and prints for each the error, what Python's audit events saw, and bytes
of memory on top: a program of test_hostile_folders.py."""

import json
import resource
import sys
import warnings

warnings.simplefilter("ignore")

import sentence_transformers  # noqa: E402, F401  # imported before what is watched
import transformers  # noqa: E402

from lookupffn import Session, load_packed  # noqa: E402
from lookupffn.hf.classifier import load_classifier  # noqa: E402
from lookupffn.hf.loading import load_encoder  # noqa: E402

ALWAYS = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.getaddrinfo",
    "pickle.find_class",
}  # fmt: skip
OPEN = {
    "bert": lambda folder: load_encoder(folder, head=True),
    "classifier": load_classifier,
    "st": load_encoder,
    "packed": lambda folder: Session(folder).embed(["w1 w2"]),
    "converted": transformers.AutoModel.from_pretrained,
    "layers": lambda folder: load_packed(folder + "/model.safetensors"),
    "control": lambda folder: exec(compile("1", folder + "/evil.py", "exec")),
}
MEMORY = 8 << 30  # enough for all that is right; more would take the machine's
UNIT = 1 if sys.platform == "darwin" else 1 << 10  # of ru_maxrss

seen: list[str] = []
folder = "/nowhere"


def hook(event, args):
    if event in ALWAYS:
        seen.append(f"{event} {args}"[:200])
    elif event in ("exec", "compile", "import", "open"):
        path = str(args[1] if event in ("compile", "import") else getattr(args[0], "co_filename", args[0]))
        if path.startswith(folder) and (event != "open" or path.endswith((".py", ".bin"))):
            seen.append(f"{event} {path}")


transformers.logging.set_verbosity_error()
with open(sys.argv[1]) as file:
    jobs = json.load(file)
resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
sys.addaudithook(hook)
for kind, folder in jobs:  # which the hook reads
    seen.clear()
    before, error, message = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "", ""
    try:
        OPEN[kind](folder)
    except BaseException as caught:
        error, message = type(caught).__name__, str(caught)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * UNIT
    print("OPENED", json.dumps([folder, error, message, list(seen), memory]), flush=True)
