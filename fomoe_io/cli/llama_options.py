"""llama.cpp's options that fomoe_io does not have: what is true here instead.

Those without a hint change nothing of the answer and are accepted with a note; the others are refused, with what to
give instead.  A command that has an option of one of these names keeps its own.
"""

from __future__ import annotations

from fomoe_io.cli.parser import NONE, ONE, OPTIONAL, Foreign

_TWO = "2"
_DRAFT = "there is no draft model: each token is computed by the whole model"
_VISION = "the model reads text only"
_ONE_THREAD_SET = "prompts are read by the threads of -t"
_BIND = "threads are the system's to place"
_PLACED = "experts go where --ram and --vram have room"
_LOADED = "experts are read from the drive with O_DIRECT, weights once into memory that --ram bounds"
_LOG = "there is no log beside notes and errors on stderr"
_ROPE = "the model's own rope scaling is used"
_SAMPLER = "this sampler is not built: there are --temp, --top-k, --top-p, --min-p and penalties"
_DOWNLOAD = "nothing is downloaded from there"


def _noted(names: str, why: str, values: str = NONE) -> Foreign:
    return Foreign(tuple(names.split()), values, why)


def _refused(names: str, why: str, hint: str, values: str = NONE, neutral: str = "") -> Foreign:
    return Foreign(tuple(names.split()), values, why, hint, tuple(neutral.split()))


ENGINE: list[Foreign] = [
    _noted("-tb --threads-batch", _ONE_THREAD_SET, ONE),
    _noted("-C --cpu-mask -Cr --cpu-range --cpu-strict -Cb --cpu-mask-batch -Crb --cpu-range-batch", _BIND, ONE),
    _noted("--cpu-strict-batch --prio --prio-batch", _BIND, ONE),
    _noted("--poll --poll-batch", "threads wait as they see fit", ONE),
    _noted("--numa", "bind the process with numactl", ONE),
    _noted("-ub --ubatch-size", "-b is the whole batch", ONE),
    _noted("--swa-full", "no architecture with a sliding window is built"),
    _noted("-fa --flash-attn", "attention has one implementation", OPTIONAL),
    _noted("--perf --no-perf", "speeds are always measured: the last line, or --json"),
    _noted("-kvo --kv-offload -nkvo --no-kv-offload --op-offload --no-op-offload", "the device of --device computes"),
    _noted("--repack -nr --no-repack --no-host", "weights are computed with as they lie in the file"),
    _noted("-dt --defrag-thold", "the KV cache has no holes", ONE),
    _noted("-lm --load-mode -lzm --lazy-mode", _LOADED, ONE),
    _noted("--mlock --mmap --no-mmap -dio --direct-io -ndio --no-direct-io", _LOADED),
    _noted("-cmoe --cpu-moe", _PLACED),
    _noted("-ncmoe --n-cpu-moe -ncffn --n-cpu-ffn", _PLACED, ONE),
    _noted("-ngl --gpu-layers --n-gpu-layers", "layers go where --vram has room", ONE),
    _noted("-mg --main-gpu", "the first of --device hip:0,1 begins, the last makes the logits", ONE),
    _noted("-fit --fit", "--ram and --vram are always kept", OPTIONAL),
    _refused("-fitt --fit-target", "the bound of device memory is given as such", "--vram 12G", ONE),
    _noted("-fitc --fit-ctx", "-c is never made smaller", ONE),
    _refused("-ot --override-tensor", "tensors are not placed by name", "--ram and --vram: experts go where room is",
        ONE),
    _noted("--check-tensors", "logits are always checked; fomoe-layout verify checks every byte of a store"),
    _refused("--override-kv", "metadata is taken as it is in the file", "gguf-set-metadata MODEL KEY VALUE", ONE),
    _refused("--rope-scaling --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx", _ROPE,
        "leave it out", ONE),
    _refused("--yarn-ext-factor --yarn-attn-factor --yarn-beta-slow --yarn-beta-fast", _ROPE, "leave it out", ONE),
    _refused("-gan --grp-attn-n -gaw --grp-attn-w", _ROPE, "leave it out", ONE),
    _refused("--rpc", "one machine computes", "leave it out", ONE),
    _refused("--lora --control-vector", "adapters and control vectors are not built",
        "a model with the adapter merged (llama-export-lora)", ONE),
    _refused("--lora-scaled --control-vector-scaled", "adapters and control vectors are not built",
        "a model with the adapter merged (llama-export-lora)", ONE),
    _refused("--control-vector-layer-range", "control vectors are not built", "leave it out", _TWO),
    _refused("-mu --model-url -dr --docker-repo", _DOWNLOAD, "-hf USER/MODEL:QUANT, or a file that you have", ONE),
    _noted("--warmup --no-warmup", "there is no warm-up run; experts start from the learned profile"),
    _noted("--log-disable --log-jsonl --no-log-jsonl --log-prefix --no-log-prefix", _LOG),
    _noted("--log-timestamps --no-log-timestamps", _LOG),
    _noted("-v --verbose --log-verbose", _LOG),
    _noted("-lv --verbosity --log-verbosity --log-file --log-prompts-dir", _LOG, ONE),
    _noted("--log-colors", "colour follows --color and NO_COLOR", OPTIONAL),
]  # fmt: skip
"""Of the model, its memory and the machine: the same for all commands that open one."""

DRAFT: list[Foreign] = [
    _noted("-ctkd --spec-draft-type-k --cache-type-k-draft", _DRAFT, ONE),
    _noted("-ctvd --spec-draft-type-v --cache-type-v-draft", _DRAFT, ONE),
    _noted("--spec-draft-threads -td --threads-draft", _DRAFT, ONE),
    _noted("--spec-draft-threads-batch -tbd --threads-batch-draft", _DRAFT, ONE),
    _noted("--spec-draft-cpu-mask -Cd --cpu-mask-draft --spec-draft-cpu-range -Crd --cpu-range-draft", _DRAFT, ONE),
    _noted("--spec-draft-cpu-strict --cpu-strict-draft --spec-draft-prio --prio-draft", _DRAFT, ONE),
    _noted("--spec-draft-poll --poll-draft --spec-draft-cpu-mask-batch -Cbd --cpu-mask-batch-draft", _DRAFT, ONE),
    _noted("--spec-draft-cpu-strict-batch --cpu-strict-batch-draft", _DRAFT, ONE),
    _noted("--spec-draft-prio-batch --prio-batch-draft --spec-draft-poll-batch --poll-batch-draft", _DRAFT, ONE),
    _noted("--spec-draft-override-tensor -otd --override-tensor-draft", _DRAFT, ONE),
    _noted("--spec-draft-cpu-moe -cmoed --cpu-moe-draft", _DRAFT),
    _noted("--spec-draft-n-cpu-moe --spec-draft-ncmoe -ncmoed --n-cpu-moe-draft", _DRAFT, ONE),
    _noted("--spec-draft-n-max --spec-draft-n-min --spec-synth-len --spec-synth-rates", _DRAFT, ONE),
    _noted("--spec-draft-p-split --draft-p-split --spec-draft-p-min --draft-p-min", _DRAFT, ONE),
    _noted("--spec-draft-backend-sampling --no-spec-draft-backend-sampling", _DRAFT),
    _noted("--spec-draft-device -devd --device-draft", _DRAFT, ONE),
    _noted("--spec-draft-ngl -ngld --gpu-layers-draft --n-gpu-layers-draft", _DRAFT, ONE),
    _noted("--spec-ngram-mod-n-min --spec-ngram-mod-n-max --spec-ngram-mod-n-match", _DRAFT, ONE),
    _noted("--spec-ngram-simple-size-n --spec-ngram-simple-size-m --spec-ngram-simple-min-hits", _DRAFT, ONE),
    _noted("--spec-ngram-map-k-size-n --spec-ngram-map-k-size-m --spec-ngram-map-k-min-hits", _DRAFT, ONE),
    _noted("--spec-ngram-map-k4v-size-n --spec-ngram-map-k4v-size-m --spec-ngram-map-k4v-min-hits", _DRAFT, ONE),
    _noted("--draft --draft-n --draft-max --draft-min --draft-n-min", _DRAFT, ONE),
    _noted("--spec-default", _DRAFT),
    _noted("--spec-type", _DRAFT, ONE),
    _refused("--spec-draft-model -md --model-draft --spec-draft-hf -hfd -hfrd --hf-repo-draft", _DRAFT,
        "leave it out: the answer is the same", ONE),
]  # fmt: skip
"""Of speculation: it never changes an answer, so all but the draft model itself are harmless."""

SAMPLING: list[Foreign] = [
    _refused("--samplers --sampler-seq --sampling-seq", "the order is llama.cpp's: penalties, top-k, top-p, min-p, "
        "temperature", "leave it out", ONE),
    _refused("--top-nsigma --top-n-sigma", _SAMPLER, "--min-p 0.05", ONE, neutral="-1 -1.0 0"),
    _refused("--xtc-probability", _SAMPLER, "leave it out", ONE, neutral="0 0.0"),
    _noted("--xtc-threshold", "--xtc-probability is 0", ONE),
    _refused("--typical --typical-p", _SAMPLER, "--min-p 0.05", ONE, neutral="1 1.0"),
    _refused("--dry-multiplier", _SAMPLER, "--repeat-penalty 1.1 or --presence-penalty 0.5", ONE, neutral="0 0.0"),
    _noted("--dry-base --dry-allowed-length --dry-penalty-last-n --dry-sequence-breaker", "--dry-multiplier is 0", ONE),
    _refused("--adaptive-target", _SAMPLER, "leave it out", ONE, neutral="-1 -1.0"),
    _noted("--adaptive-decay", "--adaptive-target is off", ONE),
    _refused("--dynatemp-range", _SAMPLER, "--temp 0.8", ONE, neutral="0 0.0"),
    _noted("--dynatemp-exp", "--dynatemp-range is 0", ONE),
    _refused("--mirostat", _SAMPLER, "--min-p 0.05", ONE, neutral="0"),
    _noted("--mirostat-lr --mirostat-ent", "--mirostat is 0", ONE),
    _refused("-l --logit-bias", "fomoe-serve takes logit_bias, this command does not", "fomoe-serve", ONE),
    _noted("-bs --backend-sampling", "tokens are chosen on the processor"),
]  # fmt: skip

CONVERSATION: list[Foreign] = [
    _noted("-cl --cache-list", "-hf MODEL says where its files are"),
    _refused("-bf --binary-file", "a prompt is text", "-f FILE", ONE),
    _noted("--keep", "a full context ends the answer; nothing is dropped from it", ONE),
    _noted("-np --parallel", "one sequence is answered at a time", ONE),
    _refused("--context-shift", "the state of these models can't be shifted: a full context ends the answer",
        "a larger -c"),
    _noted("--no-context-shift", "contexts are never shifted"),
    _noted("-ctxcp --ctx-checkpoints --swa-checkpoints", "checkpoints are made where they are of use", ONE),
    _refused("--server-base", "the model runs in this process", "fomoe-serve for a server, and any client of it", ONE),
    _refused("--verbose-prompt", "tokens are not shown", "--json FILE: token_ids"),
    _refused("-sp --special", "special tokens are not shown", "--json FILE: token_ids"),
    _noted("-mli --multiline-input", "Alt-Enter starts a new line; a pasted text keeps its lines"),
    _noted("--simple-io", "the prompt is plain where there is no terminal"),
    _refused("-mm --mmproj -mmu --mmproj-url", _VISION, "leave it out", ONE),
    _noted("--mmproj-auto --no-mmproj --no-mmproj-auto --mmproj-offload --no-mmproj-offload", _VISION),
    _noted("-mmdev --mmproj-device --image-min-tokens --image-max-tokens", _VISION, ONE),
    _noted("--video-fps --video-timestamp-interval --video-ffmpeg-dir", _VISION, ONE),
    _refused("--image --audio --video", _VISION, "a description of it in words", ONE),
    _noted("--jinja --no-jinja", "templates are always jinja2"),
    _noted("--skip-chat-parsing --no-skip-chat-parsing", "an answer is shown as the model writes it"),
    _noted("--reasoning-format", "thoughts are shown as the model writes them", ONE),
    _refused("--reasoning-effort", "the template is told on or off", "--reasoning on or --reasoning off", ONE,
        neutral="default"),
    _noted("--reasoning-budget-message", "--reasoning-budget is -1 or 0", ONE),
    _refused("--gpt-oss-20b-default --gpt-oss-120b-default", _DOWNLOAD, "-hf USER/MODEL:QUANT"),
    _refused("--vision-gemma-4b-default --vision-gemma-12b-default", _DOWNLOAD, "-hf USER/MODEL:QUANT"),
    _noted("-ptc --print-token-count", "the last line counts tokens", ONE),
    _refused("--prompt-cache", "what was read is kept by its tokens, not by a name", "--cache-disk 20G", ONE),
    _noted("--prompt-cache-all --prompt-cache-ro", "there is no --prompt-cache"),
    _noted("--in-prefix-bos", "the chat template writes what stands around a message"),
    _refused("--in-prefix --in-suffix", "the chat template writes what stands around a message",
        "--chat-template-file FILE, or --raw", ONE),
    _noted("-i --interactive -if --interactive-first -ins --instruct", "without a prompt, it is interactive"),
]  # fmt: skip

RUN = [*ENGINE, *DRAFT, *SAMPLING, *CONVERSATION]

SERVE: list[Foreign] = [
    _noted("-cb --cont-batching -nocb --no-cont-batching", "one request is answered at a time"),
    _noted("--metrics", "/metrics is there unless --no-metrics is given"),
    _noted("--webui", "the page is there unless --no-webui is given"),
    _noted("--cache-prompt", "prompts are always continued where that is possible"),
    _noted("--threads-http", "connections need no threads", ONE),
    _noted("--cache-reuse", "what a session has read is continued, never moved", ONE),
    _noted("--jinja --no-jinja", "templates are always jinja2"),
    *ENGINE,
    *DRAFT,
    *SAMPLING,
    *(option for option in CONVERSATION if option.names[0] in ("--context-shift", "--no-context-shift", "--keep", "-mm",
        "--mmproj-auto", "-mmdev", "--skip-chat-parsing", "--reasoning-effort", "-ctxcp")),
    _refused("--grammar --grammar-file -j --json-schema -jf --json-schema-file", "a request brings its own",
        "grammar, json_schema or response_format in the request", ONE),
    _refused("--embeddings --embedding --reranking --rerank", "the model writes text: no embeddings, no reranking",
        "leave it out"),
]  # fmt: skip

BENCH: list[Foreign] = [
    *ENGINE,
    _noted("-nopo", "the device of --device computes", ONE),
    _noted("-embd --embeddings", "the model writes text", ONE),
    _noted("--delay", "repetitions follow at once", ONE),
    _noted("--progress", "progress is shown on a terminal"),
]
