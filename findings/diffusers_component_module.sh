#!/usr/bin/env bash
# Ground: deep (a pipeline that was saved passes every check of diffusers until it is loaded again).
# Versions: torch 2.13.0 (CPU), diffusers 0.42.1, transformers 5.24.0, accelerate 1.15.0; Python 3.10 or newer.
#
# A pipeline of diffusers may hold a model of a class of yours that derives from ModelMixin. save_pretrained writes
# ["your.module", "YourModel"] into model_index.json, and AutoModel finds the class by it. from_pretrained of the pipeline
# then refuses the component, "it does not seem to have any of the loading methods", unless your.module also has a name
# ModelMixin: the base classes of a component are looked up in the module that has the component, not in diffusers. Models
# that derive from ModelMixin by way of a base class in another file never have it.
#
# What to do: import ModelMixin in the module of the class, though nothing there uses it.
#
# Seen:
#     without the name: saved ['model_of', 'Tiny'], AutoModel Tiny, pipeline ValueError
#     with the name: saved ['model_of', 'Tiny'], AutoModel Tiny, pipeline Tiny
# The script fails where this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 \
    diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0
cat >"$folder/base_of.py" <<'PYTHON'
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class Base(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 2):
        super().__init__()
        self.layer = nn.Linear(width, width)
PYTHON
cat >"$folder/look.py" <<'PYTHON'
import json
import sys

from diffusers import AutoModel, DiffusionPipeline
from model_of import Tiny


class Pipeline(DiffusionPipeline):
    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)


case, folder = sys.argv[1], sys.argv[2]
Pipeline(Tiny()).save_pretrained(folder)
saved = json.load(open(f"{folder}/model_index.json"))["transformer"]
alone = type(AutoModel.from_pretrained(folder, subfolder="transformer")).__name__
try:
    whole = type(Pipeline.from_pretrained(folder).transformer).__name__
except ValueError as error:
    whole = type(error).__name__
print(f"{case}: saved {saved}, AutoModel {alone}, pipeline {whole}")
PYTHON
for case in "without the name" "with the name"; do
    {
        [ "$case" = "without the name" ] || echo "from diffusers.models.modeling_utils import ModelMixin"
        printf 'from base_of import Base\n\n\nclass Tiny(Base):\n    pass\n'
    } >"$folder/model_of.py"
    "$folder/venv/bin/python" "$folder/look.py" "$case" "$folder/saved ${case%% *}"
done 2>"$folder/errors" | tee "$folder/seen"
sed -n '/^# Seen:/,/^# The script/s/^#     //p' "$0" | diff - "$folder/seen"
