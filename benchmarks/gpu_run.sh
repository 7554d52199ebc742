#!/bin/sh
# Half an hour of a GPU, used well: the tests that need one, speeds and memory, and trainings with their images.
#
#   benchmarks/gpu_run.sh DATA.hdf5 OUT [STEP...]      (all steps: tests speed evaluation chapter improved tree report)
#
# DATA.hdf5 is a file with embeddings. Every command ends within MINUTES (9 by default) and adds to OUT/STEP.txt. Typed
# again, the script skips the steps that are done, continues a training that was cut off, and reports again. TINY=1 runs
# everything with tiny networks or few steps on the CPU, to try the script itself; each training sees all captions of
# DATA.hdf5 once, so give it a small file. The status is 1 if a step failed or took too long.
set -u
[ $# -ge 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
[ -f "$1" ] || { echo "$1: no such file; give an HDF5 file with embeddings" >&2; exit 2; }
DATA=$(realpath "$1"); mkdir -p "$2"; OUT=$(realpath "$2"); shift 2
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
MINUTES=${MINUTES:-9}
NAME=$(basename "${DATA%.*}")
# 67 epochs of all of CUB are the 5.9 million images of the chapter's 200, whose file has fewer captions.
if [ "${TINY:-}" ]; then
    DEVICE=cpu; SPEED='--steps 1 --seconds 1 --repeats 1'; COUNT=4; BATCHES='4'; TREE_BATCHES='2'
    TRAIN='--epochs 1 --batch_size 4'; TREE='--epochs 1 --batch_size 2 --gf_dim 8 --df_dim 4 --workers 0'; IMAGES=50
else
    DEVICE=cuda; SPEED='--seconds 8 --repeats 1'; COUNT=29330; BATCHES='256 1024'; TREE_BATCHES='24 64'
    TRAIN='--epochs 67 --batch_size 256'; TREE='--epochs 600 --batch_size 24'; IMAGES=1500
fi

# Run a command for at most MINUTES. SIGTERM, on which a training saves, comes first; its status is then 124.
limited() { timeout --foreground --kill-after=50 "$((MINUTES * 60))" "$@"; }

# Train section $1 in OUT/$2 with the flags after them; continue the run that is there.
train() {
    section=$1; name=$2; shift 2
    if ls "$OUT/$name"/*/*.pt > /dev/null 2>&1; then
        limited "$PYTHON" "$section/main.py" --train --resume --dataset "$NAME" --out_dir "$OUT/$name"
    else
        limited "$PYTHON" "$section/main.py" --train --data_dir "$(dirname "$DATA")" --dataset "$NAME" \
            --out_dir "$OUT/$name" "$@"
    fi
}

# shellcheck disable=SC2086 - the variables hold several words
step() {
    case $1 in
    tests) limited "$PYTHON" -m pytest -q -m cuda tests ;;
    speed)
        for batch in $BATCHES; do
            limited "$PYTHON" benchmarks/train_speed.py --device $DEVICE --file "$DATA" --batch_size $batch $SPEED || return
        done
        for batch in $TREE_BATCHES; do
            for section in stackgan_v1 stackgan_v2; do
                limited "$PYTHON" benchmarks/train_speed.py --device $DEVICE --file "$DATA" --chapter $section \
                    --batch_size $batch $SPEED || return
            done
        done ;;
    evaluation) limited "$PYTHON" benchmarks/eval_speed.py --device $DEVICE --count $COUNT ;;
    chapter) train text2image chapter $TRAIN ;;
    improved) train text2image improved $TRAIN --recipe improved ;;
    tree) train stackgan_v2 tree $TREE ;;
    report)
        failed=3  # nothing was trained
        for run in "$OUT"/chapter/*_* "$OUT"/improved/*_* "$OUT"/tree/*_*; do
            [ -f "$run/options.json" ] || continue
            [ "$failed" = 3 ] && failed=0
            limited "$PYTHON" evaluation/metrics.py "$run" --count $IMAGES || failed=1
            section=text2image; case $run in "$OUT"/tree/*) section=stackgan_v2 ;; esac
            limited "$PYTHON" $section/main.py --train False --checkpoint "$run" --text_file docs/sentences.txt \
                --out_dir "$OUT/images" || failed=1
        done
        return $failed ;;
    esac
}

STEPS='tests speed evaluation chapter improved tree report'
for name in "$@"; do
    case " $STEPS " in *" $name "*) ;; *) echo "$name: no such step; give some of: $STEPS" >&2; exit 2 ;; esac
done
all_done=true
for name in ${*:-$STEPS}; do
    [ -e "$OUT/$name.done" ] && { echo "$name: done before"; continue; }
    begin=$(date +%s)
    step "$name" >> "$OUT/$name.txt" 2>&1
    status=$?
    echo "$name: status $status, $(($(date +%s) - begin)) s: $OUT/$name.txt"
    # pytest has 5 for "no test": where there is no GPU. 124: out of time, to be continued.
    case $name,$status in
    report,0) ;;
    *,0 | tests,5) touch "$OUT/$name.done" ;;
    *) all_done=false ;;
    esac
done
[ "$all_done" = true ]
