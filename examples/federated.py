"""Three clients of unequal ranks, three rounds, in one process and by hand: no engine, no files."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir
from plait.federated import Client, adapter, algorithm, weights_of
from plait.federated.guard import Guard
from plait.federated.payload import Header, Rejected, Round, pack, rank_of, unpack

base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
gen = torch.Generator().manual_seed(0)
rows = {f"c{i}": torch.randint(3, base.config.vocab_size, (4, 16), generator=gen) for i in range(3)}


def wrapped(r: int) -> torch.nn.Module:
    """The base model with an adapter of this rank."""
    config = plait.FedAloraHetConfig(r=r, common_rank=4, target_modules=["q_proj", "v_proj"])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
    return get_peft_model(model, config)


def train(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Ten local steps; returns the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


# --8<-- [start:round]
method = algorithm("fedalora_het", common_rank=4)
models = {"c0": wrapped(8), "c1": wrapped(4), "c2": wrapped(2)}
clients = {name: Client.of(name, model) for name, model in models.items()}
method.check(clients)
first = {name: adapter.read(model) for name, model in models.items()}
kept = dict.fromkeys(models)  # the private part after a client's last accepted round
state, guard, generation = (
    method.start(first["c0"], clients["c0"]),
    Guard(),
    dict.fromkeys(models, 0),
)

for number in range(1, 4):
    expected, losses = Round("demo", number, method, clients, dict(generation)), {}
    uploads, counts, private = {}, {}, {}
    for name, model in models.items():
        down = method.payload_down(state, clients[name])
        method.apply(model, down, clients[name], round=number, first=first[name], kept=kept[name])
        losses[name] = train(model, rows[name])
        local = adapter.read(model)
        private[name] = method.private(local, clients[name])  # stays
        sent = pack(  # travels
            Header(
                method.key, "demo", number, name, generation[name],
                rank_of(clients[name]), "fp32", n_examples=len(rows[name]),
            ),
            method.payload_up(local, clients[name]),
        )  # fmt: skip
        try:
            upload = unpack(sent, expected, sender=name)
        except Rejected as rejected:
            guard.count(rejected)
            continue
        uploads[name], counts[name] = upload.tensors, upload.header.n_examples
    sizes = {c: method.size(uploads[c], clients[c], state.tensors) for c in uploads}
    for name in guard.screen(sizes):
        del uploads[name], counts[name]
    guard.require(uploads, number)
    state = method.aggregate(uploads, weights_of(guard.counts(counts)), state, clients)
    for name in uploads:
        kept[name], generation[name] = private[name], number
    print(number, {name: round(loss, 3) for name, loss in losses.items()})
# --8<-- [end:round]

print("numbers up and down, by client:")
for name, client in clients.items():
    print(" ", name, method.numbers_up(client), method.numbers_down(client))
