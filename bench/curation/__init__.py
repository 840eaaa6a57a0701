# SPDX-License-Identifier: Apache-2.0
"""What `talkingdit curate` finds and costs, on drawn clips in which faults are planted.

python -m bench.curation.faults --voices data/voices --out bench/results/curate-faults.json
python -m bench.curation.speed --voices data/voices --out bench/results/curate-speed.json
python -m bench.curation.kills --voices data/voices --out bench/results/curate-kills.json
"""
