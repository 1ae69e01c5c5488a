"""The PyTorch peer: trains or encodes on request, one timed repeat at a time.

    python benchmarks/peer_env.py      # once: makes the environment, prints its Python
    PEER_PYTHON benchmarks/peer.py     # then JSON, one object per line; stderr: chatter

The first line on stdin names the job and its settings (SETTINGS below; an unknown one
is an error). The answers on stdout:

    {"ready": true, "job", "settings", "threads", "torch", "transformers", ...}
        once the model and the data are in memory; nothing has run yet
    {"seconds", "useful_tokens", ...}
        to every {"go": true}: one repeat
    {"error": "..."}
        and exit code 1 when anything fails

`{"quit": true}`, or the end of stdin, ends the worker. The first repeat also pays for
warming up: discard it.

Job `lm_ft`: one optimizer step per repeat. Step s takes the instances
s * instances_per_step and following, round and round the file in its order. Both styles
follow the same rule: fp32, AdamW, the mean loss over all target tokens of the step,
clipping by global norm. They differ in how they compute it.

`trainer` is `transformers.Trainer` itself, with the padded batches and the gradient
accumulation it is used with. A callback holds it before each step until the next `go`
and stops the clock after the optimizer's update and the clearing of the gradients.
Trainer collates a step's batches before that moment, so their collation (milliseconds)
goes uncounted, in its favour.

`careful` is a loop by hand that spends nothing on padding and computes logits at the
target positions only. Instances are packed first-fit, the longest first, into rows of
at most `row_length` tokens. With `attention: "segments"` each instance of a row attends
by its own causal call to SDPA; with "mask" one block-diagonal causal boolean mask goes
to SDPA. Collation is inside the clock.

Job `score`: the log-probability of every sequence's target, once over all sequences per
repeat; the answer has the sums. Style `single` runs one sequence at a time and takes
the logits of all of its positions, as the packaged peer does; `no_repeats` does the
same, but reads once what is read for several sequences on end (options of one token);
`padded` runs batches of sequences of like length, padded on the right, and computes
logits at the positions before targets only. Sequences come tokenised.

Job `generate`: greedy `transformers` generation from every prompt once per repeat, in
batches of like length, padded on the left; the answer has each prompt's tokens up to
its stop and the sum of their log-probabilities. Which tokens stop is said in the file:
those of `first` before anything but tokens of `blank` was said, those of `later` after
that. It also has by how many nats the likeliest token led the second at every step,
found outside the clock. Prompts come tokenised.

Job `encoder`: one pass of sentence-transformers over all texts per repeat, tokenisation
included, mean pooling and L2 norm.

Job `r_ft`: one epoch per repeat of training an encoder to score each question's
passages as a teacher does, KL(teacher || student), in fp32 and without dropout, which
ours has none of. Every epoch takes the examples in the order of the file; the answer
has the losses of all steps since the start. Style `trainer` is
`SentenceTransformerTrainer` with `DistillKLDivLoss`: one encoder for questions and
passages, both encoded and trained at every step, tokenisation and collation inside the
clock. Gradients are accumulated over parts of a step, whose activations would not fit
small memories; no part sees another's passages, so the loss is the same. Style `frozen`
is a loop by hand that embeds the passages and tokenises the questions once, outside the
clock, and trains the encoder of questions only.
"""

import ctypes
import json
import os
import sys
import tempfile
import time
from pathlib import Path

# The models are folders: nothing is to be asked of a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "true"

import torch
import transformers
from torch.nn import functional

REQUIRED = object()
IGNORED = -100  # the label that cross-entropy leaves out
SETTINGS = {
    "lm_ft": {
        "model": REQUIRED,  # folder: config.json, model.safetensors
        "instances": REQUIRED,  # JSON file: [{"tokens": [], "loss_mask": []}, ...]
        "style": "trainer",  # or "careful"
        "instances_per_step": 32,
        "batch_size": 8,  # trainer: instances per padded batch
        "row_length": 2048,  # careful: tokens per packed row
        "attention": "segments",  # careful: or "mask"
        "learning_rate": 1e-5,
        "betas": [0.9, 0.95],
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "keep_memory": None,  # as below; None: in style careful only
        "threads": 0,  # 0: the cores this process may use
    },
    "score": {
        "model": REQUIRED,  # folder: config.json, model.safetensors
        "sequences": REQUIRED,  # JSON file: [{"tokens": [], "start": 17}, ...]
        "style": "single",  # or "padded"
        "batch_tokens": 4096,  # padded: tokens per batch, padding included
        "keep_memory": None,  # as below; None: in style padded only
        "threads": 0,
    },
    "generate": {
        "model": REQUIRED,  # folder: config.json, model.safetensors
        # JSON file: {"prompts": [[17, ...], ...], "eos": 0,
        #             "stops": {"first": [0], "later": [0], "blank": [5]}}
        "prompts": REQUIRED,
        "max_new_tokens": 16,
        "batch_tokens": 8192,  # rows x (tokens of the longest prompt + new ones)
        "keep_memory": True,  # as below
        "threads": 0,
    },
    "encoder": {
        "model": REQUIRED,  # folder: config.json, model.safetensors, tokenizer.json
        "texts": REQUIRED,  # JSON file: ["...", ...]
        "batch_size": 32,
        "max_seq_length": 256,
        "keep_memory": False,  # glibc keeps freed memory, for fewer page faults
        "threads": 0,
    },
    "r_ft": {
        "model": REQUIRED,  # as of `encoder`
        # JSON file: [{"question": "", "passages": ["", ...], "scores": [0.1]}, ...]
        "examples": REQUIRED,
        "style": "trainer",  # or "frozen"
        "questions_per_step": 32,
        "batch_size": 8,  # trainer: questions per forward and backward pass
        "max_seq_length": 512,
        "student_temperature": 0.05,
        "teacher_temperature": 1.0,  # of the scores
        "learning_rate": 3e-5,
        "betas": [0.9, 0.999],
        "weight_decay": 0.0,
        "clip_norm": 2.0,
        "keep_memory": None,  # as above; None: in style frozen only
        "threads": 0,
    },
}


class Channel:
    """One JSON object per line, in and out."""

    def __init__(self):
        # Whatever the libraries print, from Python or from C, lands on stderr:
        # descriptor 1 is pointed there and only its duplicate speaks.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **answer):
        """Writes one answer."""
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    def receive(self) -> dict | None:
        """Reads one line; None at the end of stdin."""
        line = sys.stdin.readline()
        message = json.loads(line) if line else None
        if line and not isinstance(message, dict):
            raise ValueError(f"expected one JSON object per line, got {line.strip()!r}")
        return message

    def wait_for_go(self):
        """Returns at the next `go`; ends the process at `quit` or the end of stdin."""
        message = self.receive()
        if message is None or message == {"quit": True}:
            raise SystemExit(0)
        if message != {"go": True}:
            raise ValueError(f"expected go or quit: true, got {json.dumps(message)}")


def read_settings(message: dict | None) -> tuple[str, dict]:
    """Returns the job and its settings, defaults filled in."""
    given = dict(message or {})
    job = given.pop("job", None)
    if job not in SETTINGS:
        raise ValueError(f"job: expected one of {', '.join(SETTINGS)}, got {job!r}")
    if unknown := sorted(given.keys() - SETTINGS[job].keys()):
        known = ", ".join(SETTINGS[job])
        raise ValueError(
            f"{job}: unknown settings {', '.join(unknown)}; known: {known}"
        )
    settings = {**SETTINGS[job], **given}
    if missing := [name for name, value in settings.items() if value is REQUIRED]:
        raise ValueError(f"{job}: missing settings {', '.join(missing)}")
    files = ("model", "instances", "sequences", "prompts", "texts", "examples")
    for name in files:
        if name in settings and not Path(settings[name]).exists():
            raise ValueError(f"{name}: nothing at {settings[name]}")
    styles = STYLES.get(job, {})
    for name, choices in {"style": styles, "attention": ("segments", "mask")}.items():
        if name in settings and settings[name] not in choices:
            expected = ", ".join(choices)
            raise ValueError(
                f"{name}: expected one of {expected}, got {settings[name]!r}"
            )
    if settings["keep_memory"] is None:
        settings["keep_memory"] = settings["style"] in KEEPING
    if settings["keep_memory"] and sys.platform != "linux":
        raise ValueError("keep_memory: expected false, it needs glibc (Linux)")
    return job, settings


def keep_memory():
    """Lets glibc keep what torch frees, which saves the page faults of asking again."""
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    accepted = libc.mallopt(m_mmap_max, 0)
    if not (accepted and libc.mallopt(m_trim_threshold, 2**31 - 1)):
        raise RuntimeError("glibc refused mallopt: run with keep_memory false")


def lm_ft(channel: Channel, settings: dict, facts: dict):
    """Loads the language model and the instances and trains in the style asked for."""
    instances = json.loads(Path(settings["instances"]).read_text())
    per_step = settings["instances_per_step"]
    if len(instances) < per_step:
        raise ValueError(
            f"{settings['instances']}: {len(instances)} instances are fewer than "
            f"instances_per_step={per_step}"
        )
    for number, instance in enumerate(instances):
        tokens, mask = instance["tokens"], instance["loss_mask"]
        if len(tokens) != len(mask) or not any(mask[1:]):
            raise ValueError(
                f"{settings['instances']}: instance {number}: expected a loss_mask as "
                "long as tokens, with a 1 after the first place"
            )
    segments = settings["style"] == "careful" and settings["attention"] == "segments"
    if segments:
        transformers.AttentionInterface.register("segments", attend_in_segments)
        transformers.AttentionMaskInterface.register("segments", lambda *_, **__: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model"],
        dtype=torch.float32,
        attn_implementation="segments" if segments else "sdpa",
    )
    model.train()
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    facts["instances"] = len(instances)
    STYLES["lm_ft"][settings["style"]](channel, model, instances, settings, facts)


def labels_of(instance: dict) -> list[int]:
    """The token itself where it is a target, IGNORED elsewhere."""
    masked = zip(instance["tokens"], instance["loss_mask"], strict=True)
    labels = [token if is_target else IGNORED for token, is_target in masked]
    # Nothing comes before the first token: it is never a target.
    return [IGNORED, *labels[1:]]


class Cycle(torch.utils.data.Dataset):
    """The instances over and over, so that one epoch of Trainer never ends."""

    def __init__(self, instances: list[dict], length: int):
        self.instances, self.length = instances, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return self.instances[index % len(self.instances)]


def pad(batch: list[dict]) -> dict[str, torch.Tensor]:
    """Pads a batch on the right to its longest instance."""
    longest = max(len(instance["tokens"]) for instance in batch)
    short = [longest - len(instance["tokens"]) for instance in batch]
    padded = list(zip(batch, short, strict=True))
    return {
        "input_ids": torch.tensor([i["tokens"] + [0] * n for i, n in padded]),
        "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in short]),
        "labels": torch.tensor([labels_of(i) + [IGNORED] * n for i, n in padded]),
    }


class Stopwatch(transformers.TrainerCallback):
    """Holds Trainer before each step until the next `go` and answers after the step."""

    def __init__(self, channel: Channel, instances: list[dict], per_step: int, facts):
        self.channel, self.facts = channel, facts
        self.instances, self.per_step = instances, per_step
        self.started = self.seconds = 0.0

    def on_train_begin(self, args, state, control, **_):
        """Says that training can start."""
        self.channel.send(ready=True, **self.facts)

    def on_step_begin(self, args, state, control, **_):
        """Waits for the next request."""
        self.channel.wait_for_go()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        """Stops the clock: the weights are updated and the gradients cleared."""
        self.seconds = time.perf_counter() - self.started

    def on_log(self, args, state, control, logs=None, **_):
        """Answers, with the loss and gradient norm that Trainer logs every step."""
        if "grad_norm" in (logs or {}):
            step = state.global_step - 1
            chosen = step_instances(self.instances, step, self.per_step)
            lengths = [len(instance["tokens"]) for instance in chosen]
            size = args.train_batch_size
            self.channel.send(
                seconds=self.seconds,
                useful_tokens=sum(lengths),
                computed_tokens=sum(
                    max(lengths[i : i + size]) * size
                    for i in range(0, len(lengths), size)
                ),
                loss=float(logs["loss"]),
                grad_norm=float(logs["grad_norm"]),
            )


class SequentialTrainer(transformers.Trainer):
    """Trainer that takes the instances in the order of the file, as our side does."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_arguments(folder: str, per_step: int, settings: dict) -> dict:
    """What Trainer is told in every job: every step is logged, nothing is saved."""
    return {
        "output_dir": folder,  # Trainer wants one all the same
        "per_device_train_batch_size": settings["batch_size"],
        "gradient_accumulation_steps": per_step // settings["batch_size"],
        "learning_rate": settings["learning_rate"],
        "adam_beta1": settings["betas"][0],
        "adam_beta2": settings["betas"][1],
        "weight_decay": settings["weight_decay"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def train_with_trainer(
    channel: Channel, model, instances: list[dict], settings: dict, facts: dict
):
    """Style `trainer`."""
    per_step, batch_size = settings["instances_per_step"], settings["batch_size"]
    if per_step % batch_size:
        raise ValueError(
            f"instances_per_step={per_step} is not a multiple of {batch_size=}"
        )
    steps = 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            **trainer_arguments(folder, per_step, settings),
            max_steps=steps,
            max_grad_norm=settings["clip_norm"],
            remove_unused_columns=False,
        )
        SequentialTrainer(
            model=model,
            args=arguments,
            train_dataset=Cycle(instances, per_step * steps),
            data_collator=pad,
            callbacks=[Stopwatch(channel, instances, per_step, facts)],
        ).train()


def step_instances(instances: list[dict], step: int, per_step: int) -> list[dict]:
    """The next instances in the order of the file, round and round."""
    first = step * per_step
    return [instances[i % len(instances)] for i in range(first, first + per_step)]


def attend_in_segments(
    module, query, key, value, attention_mask, scaling=None, segment_lengths=(), **_
):
    """Causal attention within each instance of a row without padding.

    Takes (1, heads, tokens, head size) and returns (1, tokens, heads, head size).
    """
    split = (x.split(segment_lengths, dim=2) for x in (query, key, value))
    options = {"is_causal": True, "scale": scaling, "enable_gqa": True}
    attended = [
        functional.scaled_dot_product_attention(*part, **options)
        for part in zip(*split, strict=True)
    ]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def pack(chosen: list[dict], row_length: int) -> list[list[dict]]:
    """First-fit, the longest first; one longer than a row gets a row of its own."""
    rows: list[list[dict]] = []
    room: list[int] = []
    for instance in sorted(chosen, key=lambda instance: -len(instance["tokens"])):
        need = len(instance["tokens"])
        fit = next((i for i, left in enumerate(room) if need <= left), None)
        if fit is None:
            rows.append([])
            room.append(row_length)
            fit = -1
        rows[fit].append(instance)
        room[fit] -= need
    return rows


def row_inputs(row: list[dict], attention: str) -> tuple[dict, torch.Tensor]:
    """The model's inputs for one row and the label of the token after each position."""
    lengths = [len(instance["tokens"]) for instance in row]
    inputs = {
        "input_ids": torch.cat([torch.tensor(i["tokens"]) for i in row])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    if attention == "segments":
        inputs["segment_lengths"] = lengths
    else:
        blocks = [torch.ones(n, n).tril() for n in lengths]
        inputs["attention_mask"] = torch.block_diag(*blocks).bool()[None, None]
    # Every instance's first label is IGNORED, so the position before it, the last of
    # the instance before, predicts nothing.
    labels = [label for instance in row for label in labels_of(instance)]
    return inputs, torch.tensor([*labels[1:], IGNORED])


def train_with_care(
    channel: Channel, model, instances: list[dict], settings: dict, facts: dict
):
    """Style `careful`."""
    # Norm scales are spared from weight decay, as Trainer does it.
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings["learning_rate"],
        betas=tuple(settings["betas"]),
        fused=True,
    )
    channel.send(ready=True, **facts)
    step = 0
    while True:
        channel.wait_for_go()
        started = time.perf_counter()
        chosen = step_instances(instances, step, settings["instances_per_step"])
        packed = pack(chosen, settings["row_length"])
        rows = [row_inputs(row, settings["attention"]) for row in packed]
        targets = sum(int((labels != IGNORED).sum()) for _, labels in rows)
        loss = 0.0
        for inputs, labels in rows:
            at = labels != IGNORED
            hidden = model.model(**inputs, use_cache=False).last_hidden_state[0]
            logits = model.lm_head(hidden[at])
            summed = functional.cross_entropy(logits, labels[at], reduction="sum")
            (summed / targets).backward()
            loss += summed.item() / targets
        grad_norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), settings["clip_norm"]
        )
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        useful = sum(len(labels) for _, labels in rows)
        channel.send(
            seconds=seconds,
            useful_tokens=useful,
            computed_tokens=useful,
            loss=loss,
            grad_norm=grad_norm.item(),
        )
        step += 1


def score(channel: Channel, settings: dict, facts: dict):
    """Scores all sequences once per request."""
    sequences = json.loads(Path(settings["sequences"]).read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    useful = sum(len(sequence["tokens"]) for sequence in sequences)
    channel.send(ready=True, **facts, sequences=len(sequences))
    run = STYLES["score"][settings["style"]]
    while True:
        channel.wait_for_go()
        started = time.perf_counter()
        with torch.inference_mode():
            sums = run(model, sequences, settings)
        seconds = time.perf_counter() - started
        channel.send(
            seconds=seconds, count=len(sequences), useful_tokens=useful, sums=sums
        )


def score_singly(model, sequences: list[dict], settings: dict) -> list[float]:
    """Style `single`."""
    sums = []
    for sequence in sequences:
        tokens, start = torch.tensor(sequence["tokens"]), sequence["start"]
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        log = logits[start - 1 : -1].log_softmax(-1)
        sums.append(float(log.gather(1, tokens[start:, None]).sum()))
    return sums


def score_without_repeats(model, sequences: list[dict], settings: dict) -> list[float]:
    """Style `no_repeats`."""
    sums = []
    before = None
    for sequence in sequences:
        tokens, start = torch.tensor(sequence["tokens"]), sequence["start"]
        read = sequence["tokens"][:-1]
        if read != before:
            logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
            before = read
        log = logits[start - 1 :].log_softmax(-1)
        sums.append(float(log.gather(1, tokens[start:, None]).sum()))
    return sums


def score_padded(model, sequences: list[dict], settings: dict) -> list[float]:
    """Style `padded`."""
    sums = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]["tokens"]))
    while order:
        longest = len(sequences[order[0]]["tokens"])
        size = max(settings["batch_tokens"] // longest, 1)
        chosen, order = order[:size], order[size:]
        batch = [sequences[i] for i in chosen]
        short = [longest - len(sequence["tokens"]) for sequence in batch]
        padded = zip(batch, short, strict=True)
        hidden = model.model(
            input_ids=torch.tensor([s["tokens"] + [0] * n for s, n in padded]),
            attention_mask=torch.tensor([[1] * (longest - n) + [0] * n for n in short]),
            use_cache=False,
        ).last_hidden_state
        for row, (i, sequence) in enumerate(zip(chosen, batch, strict=True)):
            start, end = sequence["start"], len(sequence["tokens"])
            log = model.lm_head(hidden[row, start - 1 : end - 1]).log_softmax(-1)
            target = torch.tensor(sequence["tokens"][start:])
            sums[i] = float(log.gather(1, target[:, None]).sum())
    return sums


class AtStop(transformers.StoppingCriteria):
    """Ends a row at a stop token; white space before an answer is no part of it."""

    def __init__(self, stops: dict[str, list[int]], vocabulary: int, start: int):
        self.first, self.later, self.blank = (
            torch.zeros(vocabulary, dtype=torch.bool).index_fill(
                0, torch.tensor(stops[name], dtype=torch.long), True
            )
            for name in ("first", "later", "blank")
        )
        self.start = start  # of what is generated

    def __call__(self, input_ids, scores, **_):
        """Which rows end with their last token."""
        begun = ~self.blank[input_ids[:, self.start : -1]].all(-1)
        last = input_ids[:, -1]
        return torch.where(begun, self.later[last], self.first[last])


def generate(channel: Channel, settings: dict, facts: dict):
    """Continues all prompts once per request."""
    given = json.loads(Path(settings["prompts"]).read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    channel.send(ready=True, **facts, prompts=len(given["prompts"]))
    while True:
        channel.wait_for_go()
        with torch.inference_mode():
            channel.send(**generate_all(model, given, settings))


def generate_all(model, given: dict, settings: dict) -> dict:
    """One pass over all prompts, the longest first."""
    prompts, eos, new = given["prompts"], given["eos"], settings["max_new_tokens"]
    config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=eos,
        pad_token_id=eos,
        return_dict_in_generate=True,
        output_logits=True,
    )
    found: dict[str, list] = {
        name: [None] * len(prompts) for name in ("tokens", "sums", "margins")
    }
    seconds = 0.0
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        started = time.perf_counter()
        longest = len(prompts[order[0]])
        size = max(settings["batch_tokens"] // (longest + new), 1)
        chosen, order = order[:size], order[size:]
        short = [longest - len(prompts[i]) for i in chosen]
        padded = zip(chosen, short, strict=True)
        stop = AtStop(given["stops"], model.config.vocab_size, longest)
        result = model.generate(
            input_ids=torch.tensor([[eos] * n + prompts[i] for i, n in padded]),
            attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in short]),
            generation_config=config,
            stopping_criteria=[stop],
        )
        said = result.sequences[:, longest:]
        log = torch.stack(
            [
                logits.gather(1, said[:, [step]])[:, 0] - logits.logsumexp(-1)
                for step, logits in enumerate(result.logits)
            ],
            dim=1,
        )
        ends = [
            stop(result.sequences[:, : longest + n], None)
            for n in range(1, said.shape[1] + 1)
        ]
        # Rows that never stop are as long as what was generated.
        ended = torch.stack([*ends[:-1], torch.ones_like(ends[-1])], dim=1)
        lengths = (ended.int().argmax(1) + 1).tolist()
        for row, (i, length) in enumerate(zip(chosen, lengths, strict=True)):
            found["tokens"][i] = said[row, :length].tolist()
            found["sums"][i] = float(log[row, :length].sum())
        seconds += time.perf_counter() - started
        best = torch.stack([logits.topk(2).values for logits in result.logits], dim=1)
        margins = best[..., 0] - best[..., 1]
        for row, (i, length) in enumerate(zip(chosen, lengths, strict=True)):
            found["margins"][i] = margins[row, :length].tolist()
    return {"seconds": seconds, "count": len(prompts), **found}


def sentence_encoder(settings: dict):
    """The encoder as sentence-transformers has it: mean pooling and L2 norm."""
    import sentence_transformers
    from sentence_transformers.sentence_transformer.modules import (
        Normalize,
        Pooling,
        Transformer,
    )

    bert = Transformer(settings["model"], max_seq_length=settings["max_seq_length"])
    size = bert.auto_model.config.hidden_size
    model = sentence_transformers.SentenceTransformer(
        modules=[bert, Pooling(size, pooling_mode="mean"), Normalize()], device="cpu"
    )
    # Tokenizer files may come with a truncation of their own: ours counts.
    model.max_seq_length = settings["max_seq_length"]
    return model


def encoder(channel: Channel, settings: dict, facts: dict):
    """Encodes all texts once per request."""
    import sentence_transformers

    texts = json.loads(Path(settings["texts"]).read_text())
    model = sentence_encoder(settings)
    size = model.get_embedding_dimension()
    useful = sum(
        int(model.preprocess([text])["attention_mask"].sum()) for text in texts
    )
    channel.send(
        ready=True,
        **facts,
        sentence_transformers=sentence_transformers.__version__,
        texts=len(texts),
    )
    while True:
        channel.wait_for_go()
        started = time.perf_counter()
        embeddings = model.encode(
            texts,
            batch_size=settings["batch_size"],
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        seconds = time.perf_counter() - started
        if embeddings.shape != (len(texts), size):
            raise ValueError(
                f"{len(texts)} texts gave embeddings of {embeddings.shape}"
            )
        channel.send(seconds=seconds, count=len(texts), useful_tokens=useful)


def r_ft(channel: Channel, settings: dict, facts: dict):
    """Loads the encoder and the examples and trains in the style asked for."""
    import sentence_transformers

    examples = json.loads(Path(settings["examples"]).read_text())
    if not examples or len(examples) % settings["questions_per_step"]:
        raise ValueError(
            f"{settings['examples']}: {len(examples)} examples are no whole steps of "
            f"{settings['questions_per_step']}"
        )
    model = sentence_encoder(settings)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    facts |= {
        "sentence_transformers": sentence_transformers.__version__,
        "examples": len(examples),
    }
    STYLES["r_ft"][settings["style"]](channel, model, examples, settings, facts)


class EpochWatch(transformers.TrainerCallback):
    """Holds Trainer before each epoch until the next `go` and answers after it."""

    def __init__(self, channel: Channel, count: int, scale: float, facts: dict):
        self.channel, self.count, self.facts = channel, count, facts
        self.scale = scale  # of the logged losses
        self.started = 0.0
        self.losses: list[float] = []

    def on_train_begin(self, args, state, control, **_):
        """Says that training can start."""
        self.channel.send(ready=True, **self.facts)

    def on_epoch_begin(self, args, state, control, **_):
        """Waits for the next request."""
        self.channel.wait_for_go()
        self.started = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_):
        """Keeps the loss that Trainer logs every step."""
        if "grad_norm" in (logs or {}):
            self.losses.append(float(logs["loss"]) / self.scale)

    def on_epoch_end(self, args, state, control, **_):
        """Stops the clock and answers."""
        seconds = time.perf_counter() - self.started
        self.channel.send(seconds=seconds, count=self.count, losses=self.losses)


def in_order(dataset, **settings):
    """Batches in the order of the file, as our side takes them."""
    from sentence_transformers.base.sampler import DefaultBatchSampler

    return DefaultBatchSampler(torch.utils.data.SequentialSampler(dataset), **settings)


def retriever_with_trainer(
    channel: Channel, model, examples: list[dict], settings: dict, facts: dict
):
    """Style `trainer` of `r_ft`."""
    import datasets
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

    per_step, batch_size = settings["questions_per_step"], settings["batch_size"]
    if per_step % batch_size:
        raise ValueError(
            f"questions_per_step={per_step} is not a multiple of {batch_size=}"
        )
    columns = {"query": [example["question"] for example in examples]}
    for place in range(len(examples[0]["passages"])):
        name = f"negative_{place}" if place else "positive"
        columns[name] = [example["passages"][place] for example in examples]
    columns["label"] = [example["scores"] for example in examples]
    loss = DistillKLDivLoss(
        model,
        student_temperature=settings["student_temperature"],
        teacher_temperature=settings["teacher_temperature"],
    )
    # That loss is scaled by the student's temperature squared. Adam does not mind, but
    # clipping does.
    scale = settings["student_temperature"] ** 2
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            **trainer_arguments(folder, per_step, settings),
            batch_sampler=in_order,
            num_train_epochs=100_000,
            max_grad_norm=settings["clip_norm"] * scale,
        )
        SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict(columns),
            loss=loss,
            callbacks=[EpochWatch(channel, len(examples), scale, facts)],
        ).train()


def retriever_with_care(
    channel: Channel, model, examples: list[dict], settings: dict, facts: dict
):
    """Style `frozen` of `r_ft`."""
    texts = sorted({text for example in examples for text in example["passages"]})
    number = {text: row for row, text in enumerate(texts)}
    passages = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    rows = torch.tensor([[number[t] for t in e["passages"]] for e in examples])
    teacher = torch.tensor([example["scores"] for example in examples])
    teacher = (teacher / settings["teacher_temperature"]).softmax(-1)
    tokens = model.tokenizer([example["question"] for example in examples])["input_ids"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["learning_rate"],
        betas=tuple(settings["betas"]),
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    model.train()
    losses: list[float] = []
    channel.send(ready=True, **facts, passages=len(texts))
    while True:
        channel.wait_for_go()
        started = time.perf_counter()
        for chosen in torch.arange(len(examples)).split(settings["questions_per_step"]):
            batch = {"input_ids": [tokens[i] for i in chosen.tolist()]}
            features = dict(model.tokenizer.pad(batch, return_tensors="pt"))
            queries = model(features)["sentence_embedding"]
            scores = torch.einsum("be,bce->bc", queries, passages[rows[chosen]])
            student = (scores / settings["student_temperature"]).log_softmax(-1)
            loss = functional.kl_div(student, teacher[chosen], reduction="batchmean")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        seconds = time.perf_counter() - started
        channel.send(seconds=seconds, count=len(examples), losses=losses)


STYLES = {
    "lm_ft": {"trainer": train_with_trainer, "careful": train_with_care},
    "score": {
        "single": score_singly,
        "no_repeats": score_without_repeats,
        "padded": score_padded,
    },
    "r_ft": {"trainer": retriever_with_trainer, "frozen": retriever_with_care},
}
KEEPING = ("careful", "padded", "frozen")  # the styles that keep memory
JOBS = {
    "lm_ft": lm_ft,
    "score": score,
    "generate": generate,
    "encoder": encoder,
    "r_ft": r_ft,
}


def main() -> int:
    """Serves one job; returns the exit code."""
    channel = Channel()
    try:
        job, settings = read_settings(channel.receive())
        if settings["keep_memory"]:
            keep_memory()
        torch.set_num_threads(settings["threads"] or len(os.sched_getaffinity(0)))
        facts = {
            "job": job,
            "settings": settings,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        JOBS[job](channel, settings, facts)
    except Exception as error:
        channel.send(error=f"{type(error).__name__}: {error}")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
