#!/usr/bin/env bash
# Ground: deep (importing a module changes the folder that it lies in).
# Versions: gradio 6.31.0, Python 3.10 or newer.
#
# Whoever derives a class from a component of gradio, gr.Image or gr.Textbox, finds a file beside the module after it was
# imported: module.pyi, the whole source again with imports for the types of listeners. The metaclass of components writes
# it whenever the class is made, so also where the package was installed, if the folder can be written to. Type checkers
# take the file in the place of the module, tools that format or count a source tree find a second copy of it, and a
# version control that was told to take everything takes it in. Where the folder is read-only, nothing is said.
#
# What to do: no class of your own; set methods of the instance (component.preprocess = ...), or keep *.pyi out of what is
# committed and packed.
#
# Seen:
#     before: ['own.py', 'plain.py']
#     after import plain: ['own.py', 'plain.py']
#     after import own: ['own.py', 'own.pyi', 'plain.py'], a copy of the class: True, Dependency in it: True
# The script fails where this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check gradio==6.31.0
mkdir "$folder/app"
cat >"$folder/app/plain.py" <<'PYTHON'
import gradio as gr

picture = gr.Image(render=False)
PYTHON
cat >"$folder/app/own.py" <<'PYTHON'
import gradio as gr


class Portrait(gr.Image):
    """A picture of somebody."""
PYTHON
cat >"$folder/look.py" <<'PYTHON'
import importlib
import sys
from pathlib import Path

sys.dont_write_bytecode = True
app = Path(sys.argv[1])
sys.path.insert(0, str(app))


def there():
    return sorted(path.name for path in app.iterdir() if path.is_file())


print("before:", there())
importlib.import_module("plain")
print("after import plain:", there())
importlib.import_module("own")
stub, module = (app / name for name in ("own.pyi", "own.py"))
text = stub.read_text() if stub.exists() else ""
copied = module.read_text().split("\n")[3] in text
print(f"after import own: {there()}, a copy of the class: {copied}, Dependency in it: {'Dependency' in text}")
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder/app" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
before: ['own.py', 'plain.py']
after import plain: ['own.py', 'plain.py']
after import own: ['own.py', 'own.pyi', 'plain.py'], a copy of the class: True, Dependency in it: True
SEEN
