"""A stand-in for vLLM: a package of that name whose API server is a few lines of the standard library.

``FAKE_VLLM`` says how it behaves: ``healthy``, ``dies``, ``never`` (ready), ``taken`` (its port, once), ``stubborn``
(about being told to end), ``brief`` (dies soon after it was ready). It starts a child of its own, as vLLM does, and
writes what it was given into the file that ``FAKE_VLLM_SEEN`` names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SERVER = """
import http.server, json, os, signal, subprocess, sys, threading, time

behaviour = os.environ.get("FAKE_VLLM", "healthy")
seen = os.environ["FAKE_VLLM_SEEN"]
arguments = sys.argv[1:]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
template = arguments[arguments.index("--chat-template") + 1] if "--chat-template" in arguments else None
with open(seen + ".part", "w") as file:
    json.dump({
        "pid": os.getpid(), "group": os.getpgrp(), "arguments": arguments, "environment": dict(os.environ),
        "template": open(template, encoding="utf-8").read() if template else None,
    }, file)
first = not os.path.exists(seen)
os.replace(seen + ".part", seen)
print("loading", os.environ.get("VLLM_API_KEY"), flush=True)
if behaviour == "dies":
    print("ValueError: head size 7 is not supported", flush=True)
    print("RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
    sys.exit(1)
if behaviour == "taken" and first:
    print("OSError: [Errno 98] Address already in use", flush=True)
    sys.exit(1)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, lambda number, frame: open(seen + ".told", "w").close())
if behaviour == "never":
    time.sleep(600)
names = [arguments[arguments.index("--served-model-name") + 1]]
if "--lora-modules" in arguments:
    for argument in arguments[arguments.index("--lora-modules") + 1:]:
        if argument.startswith("--"):
            break
        names.append(argument.partition("=")[0])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        key = os.environ.get("VLLM_API_KEY")
        allowed = self.path == "/health" or key is None or self.headers.get("Authorization") == f"Bearer {key}"
        body = json.dumps({"data": [{"id": name} for name in names]}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if behaviour == "brief" and self.path != "/health":
            threading.Timer(0.5, lambda: os._exit(9)).start()

    def log_message(self, *arguments):
        pass

port = int(arguments[arguments.index("--port") + 1])
http.server.ThreadingHTTPServer((arguments[arguments.index("--host") + 1], port), Handler).serve_forever()
"""
REGISTRY = """
_TEXT_GENERATION_MODELS = {"LlamaForCausalLM": ("llama", "LlamaForCausalLM")}
"""
METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"


def write(folder: Path) -> Path:
    """Write the package, for the front of ``sys.path`` and ``PYTHONPATH``; it passes for a build for processors."""
    files = {
        "vllm/__init__.py": "",
        "vllm/entrypoints/__init__.py": "",
        "vllm/entrypoints/openai/__init__.py": "",
        "vllm/entrypoints/openai/api_server.py": SERVER,
        "vllm/model_executor/__init__.py": "",
        "vllm/model_executor/models/__init__.py": "",
        "vllm/model_executor/models/registry.py": REGISTRY,
        "vllm-0.32.0+cpu.dist-info/METADATA": METADATA,
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def seen(file: Path) -> dict[str, Any]:
    """What the server was given."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def alive(group: int) -> list[int]:
    """Processes of a process group that still run (those that are dead and not yet waited for do not)."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # pid (name) state ppid pgrp ...: the name may hold anything.
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(pgrp) == group and state not in "ZX":
            found.append(int(entry.name))
    return found
