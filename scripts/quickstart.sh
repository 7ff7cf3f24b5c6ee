#!/usr/bin/env bash
# From nothing to better weights: install, fine-tune the embedded pipeline, measure before and after with plain diffusers.
# Two CPU cores, no GPU, no download but packages. Arguments are overrides of the configuration, such as num_steps=20.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export OMP_NUM_THREADS=1
run=runs/quickstart
number=1
while [ -e "$run" ]; do number=$((number + 1)); run="runs/quickstart-$number"; done
torchrun --nproc_per_node 2 --module flowsteer.rl.command train embedded_nft_composition "output=$run" "$@"
python scripts/compare_with_diffusers.py "$run"
flowsteer report "$run"
echo "weights: $run/export/pytorch_lora_weights.safetensors"
echo "report:  $run/report.html"
