# %% [markdown]
# # Bonus 03 · Memory, loss weights, and slices that see each other
#
# <!-- medtut:colab --><!-- /medtut:colab -->
#
# **Question.** The report of lesson 03 leaves three things behind: batches that "did not fit", two
# weights in a loss that were changed and never compared, and an attention across slices that was
# tried and dropped. What does each of them cost, and what could it bring?
#
# **You will be able to** count the bytes that a training step keeps, without owning the card; say
# what two weights in a loss mean to the gradient; and write an attention across slices that starts
# as the model it is added to, with a control that has the same parameters and no neighbours.
#
# **You need** lesson 03. No GPU.
#
# <!-- medtut:cost --><!-- /medtut:cost -->

# %%
# Only where the course is not installed, such as Colab; a torch that is there stays.
import importlib.util

if importlib.util.find_spec("medtut") is None:
    # medtut:install
    # /medtut:install
    pass

# %% tags=["parameters"]
profile = "quick"
seed = 0
data = None
out = None
model = None
checkpoint = None
side = None
first_layer = None
steps = None
batch_size = None
jitter = None
slices = None
train_patients = None
validation_patients = None
test_patients = None
rate = None
width = None

# %%
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from medtut import viz
from medtut.course import open_lesson
from medtut.course.lessons import l03, sam, sam_judge
from medtut.lora import LoRAConfig
from medtut.models.sam import adapt_sam, build_sam
from medtut.models.sam_prompts import decode
from medtut.models.sam_stages import PrefixCache, first_trainable, run
from medtut.train import TrainConfig, fit

lesson = open_lesson(
    "bonus/03_memory_and_depth", profile=profile, seed=seed, data=data, out=out, model=model,
    checkpoint=checkpoint, side=side, first_layer=first_layer, steps=steps,
    batch_size=batch_size, jitter=jitter, slices=slices, train_patients=train_patients,
    validation_patients=validation_patients, test_patients=test_patients, rate=rate,
    width=width,
)
lesson

# %% [markdown]
# ## 1 · Batches that do not fit
#
# A training step holds four things: the weights, their gradients, two running means of Adam for
# every *trained* weight, and the intermediate results that the backward pass will want again. The
# first three do not know how large the batch is. The fourth grows with it, and PyTorch lets us
# watch it: a hook sees every tensor that is saved for the backward pass. A tensor may be a view of
# another, so storages are counted, each once, and the model's own weights are left out.

# %% tags=["export"]
def kept_bytes(step, model):
    """Bytes that step() keeps for its backward pass, the model's own tensors apart."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # where it lies: alive, so no other has it
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values())

# %% [markdown]
# We train five things in the lesson's LiteMedSAM, at the size of the lesson's pictures:
#
# - the **full** encoder;
# - **LoRA in layers 1 to 3**, every attention block, as the report places its adapters;
# - **LoRA in layers 2 and 3**, as in the lesson;
# - the same with the **frozen prefix from the cache**;
# - the **decoder** alone, on an embedding that was computed before.

# %%
task = sam.load_task(lesson.settings)
arm = sam.DESIGNS["decoder"]
train = sam.slices_of(task, "train", arm, lesson.settings, lesson.seed)
picture = sam_judge.Frames(train[:1], lesson.settings, 0.0)[0]["x"][None]

def adapted(encoder="lora", decoder="frozen", first=2):
    small = sam.build("zero", lesson.settings)
    blocks = rf"image_encoder\.layers\.[{first}-3]\..*qkv"
    adapt_sam(small, LoRAConfig(4, 4.0, roles=("query", "value"), pattern=blocks),
              encoder=encoder, decoder=decoder)
    return small

def one_step(small, pictures, prompts=1, cached=False):
    encoder, x = small.image_encoder, picture.expand(pictures, -1, -1, -1)
    start = first_trainable(encoder) if cached else 0
    with torch.no_grad():
        x = run(encoder, x, 0, start)  # nothing unless cached
    boxes = torch.tensor([10.0, 10, 40, 40]).expand(pictures, prompts, 4)
    return decode(small, run(encoder, x, start), boxes)

# %%
designs = {"full encoder": ({"encoder": "full"}, False), "LoRA, layers 1–3": ({"first": 1}, False),
           "LoRA, layers 2–3": ({}, False), "the same, prefix cached": ({}, True),
           "decoder only": ({"encoder": "frozen", "decoder": "full"}, True)}
batches, crowd, mib = (1, 2), (1, 4, 16), {}
for name, (how, cached) in designs.items():
    small = adapted(**how)
    mib[name] = [kept_bytes(lambda: one_step(small, n, cached=cached), small) / 2**20
                 for n in batches]
by_prompt = [kept_bytes(lambda: one_step(small, 1, m, True), small) / 2**20 for m in crowd]
each = {name: (row[-1] - row[0]) / (batches[-1] - batches[0]) for name, row in mib.items()}
per_prompt = (by_prompt[-1] - by_prompt[0]) / (crowd[-1] - crowd[0])
for name, row in mib.items():
    print(f"{name:24s}" + "".join(f"{value:8.1f}" for value in row)
          + f" MiB   {each[name]:6.1f} for every further picture")
lesson.record(mib_full=each["full encoder"], mib_lora_all=each["LoRA, layers 1–3"],
              mib_lora=each["LoRA, layers 2–3"], mib_cached=each["the same, prefix cached"],
              mib_decoder=each["decoder only"], mib_prompt=per_prompt)
print(f"every further prompt on a picture: {per_prompt:.1f} MiB")

# %%
fig, (left, right) = viz.figure(1, 2, width=8.5, height=3.2)
for shift, (name, row) in enumerate(mib.items()):
    left.plot(batches, row, label=name, ls="--" if "cached" in name else "-")
left.set(xlabel="pictures in a batch", ylabel="MiB kept for the backward pass",
         xticks=batches, ylim=(0, None))
left.legend(frameon=False, fontsize=8)
right.plot(crowd, by_prompt, color=viz.PURPLE)
right.set(xlabel="prompts on one picture, decoder only", ylabel="MiB", xticks=crowd, ylim=(0, None))
lesson.show(fig, "memory", "Left: memory kept for the backward pass against the number of "
            "pictures, one straight line for each of five designs, the full encoder the steepest "
            "and the decoder alone nearly flat. Right: memory against prompts on one picture.");

# %% [markdown]
# Three things stand in it.
#
# **A parameter-efficient method need not be memory-efficient.** LoRA in every attention block trains
# half a per cent of the weights, and still has to carry the gradient through everything above the
# first adapter. What it saves of the full encoder's share is what lies *below* that adapter, and
# the inputs of frozen layers, which are needed only where a weight is trained. Where the adapters
# begin matters more than how large they are.
#
# **The cache does not change this number.** Lines three and four lie on each other: autograd never
# kept anything of a frozen beginning, cached or not. What the cache saves is *time* (and the
# passing peak of the forward pass). It is easy to credit it with more.
#
# **A further box costs the decoder once more, and nothing else.** The encoder runs once per picture,
# however many boxes are asked about it: compare the last line with the first ones. With the decoder
# alone, a picture costs no more than a box, since both are one pass through it.
#
# ### At full size
#
# The report's own model is ViT-B at 1024². Sizes need no numbers: on PyTorch's *meta* device a tensor has
# a shape and no content, so the whole network runs through in no memory, and the hook still adds up
# exact bytes. For the adapters we free the weights of query, key and value instead, which keeps the same
# tensors except for the rank-wide ones inside `B A x` (a MiB or two a block). A count without contents
# has to be right, so first it is compared with a real one.

# %%
from medtut.models.litemedsam import LiteMedSAM

whole, gib = adapted(encoder="full").image_encoder, {}
counted = {"real": kept_bytes(lambda: whole(picture), whole)}
with torch.device("meta"):
    ghost = LiteMedSAM().image_encoder
    counted["meta"] = kept_bytes(lambda: ghost(torch.zeros(picture.shape)), ghost)
    large, shape = build_sam("vit_b").image_encoder, torch.zeros(1, 3, 1024, 1024)
    for name in ("full", "attention"):
        for key, p in large.named_parameters():
            p.requires_grad_(name == "full" or "qkv" in key)
        gib[name] = kept_bytes(lambda: large(shape), large) / 2**30
tables = 4 * 12 * 4096**2 * 4 / 2**30  # blocks, heads, tokens squared, bytes
adam = {"full": 89_670_912, "attention": 36_864 * 64}  # weights trained; LoRA of rank 64
lesson.record(meta_minus_real=counted["meta"] - counted["real"], vit_full_gib=gib["full"],
              vit_lora_gib=gib["attention"], vit_tables_gib=tables)
print({name: f"{count:,} bytes" for name, count in counted.items()})
for name, amount in gib.items():
    print(f"{name:10s}{amount:6.2f} GiB a picture; gradients and Adam "
          f"{12 * adam[name] / 2**30:5.2f} GiB")
print(f"attention tables of the four global blocks alone: {tables:.2f} GiB")

# %% [markdown]
# A 1024² picture is 64 × 64 = 4096 tokens. In the four blocks with global attention each of twelve heads
# keeps a table of 4096², and these tables are half of the cost. LoRA takes nearly all off the last column
# and about a sixth off the first. So the report's remark is plausible for any card of its time, *and* it is
# about where the gradient flows: a decoder on stored embeddings would have taken batches of dozens.
# (Which card it was is not recorded, so what fitted on it stays open. Attention that never writes
# the table down, as `scaled_dot_product_attention` does, is another way out; segment-anything does
# not use it, because of its relative positions.)
#
# **And a batch need not fit.** The gradient of a mean over four pictures is the mean of four gradients.
# `TrainConfig(batch_size=1, accumulate=4)` takes them one by one and steps once. This is exact
# where no layer mixes the pictures of a batch; SAM has no batch norm, and LiteMedSAM's are frozen.

# %%
real = sam.build("lora", lesson.settings)
frames = sam_judge.Frames(train[:4:2], lesson.settings, 0.0)
pair = torch.utils.data.default_collate([frames[0], frames[1]])
loss = sam.loss_of(arm, real.image_encoder, lesson.settings)

def gradient(*batches):
    real.zero_grad()
    for batch in batches:
        (loss(real, batch) / len(batches)).backward()
    return torch.cat([p.grad.flatten() for p in real.parameters() if p.grad is not None])

together = gradient(pair)
apart = gradient(*[{key: value[k : k + 1] for key, value in pair.items()} for k in (0, 1)])
gap = float((together - apart).abs().max() / together.abs().max())
lesson.record(accumulation_gap=gap)
print(f"two at once and one by one: gradients differ by {gap:.1e} of the largest entry")

# %% [markdown]
# What accumulating does not give is speed. Checkpointing (recompute instead of keep) is the third way,
# at the price of one more forward pass.
#
# ## 2 · The weights of the loss
#
# SAMed trains with 0.2 cross-entropy + 0.8 Dice. The report's code has MONAI's default, 1 : 1, and one
# version of July 2024 had 0.4 · mean squared error + 0.7 · cross-entropy, without Dice. No comparison
# is reported. Under Adam a common factor cancels (apart from clipping and weight decay), so only the
# *ratio* of the weights counts. But a ratio of what? We measure what arrives at the logits of the
# unadapted model: how large each term's gradient is, and which part of it lies on the lesion.

# %%
from monai.losses import DiceCELoss

def weighted(ce, dice):
    return DiceCELoss(sigmoid=True, squared_pred=True, lambda_ce=ce, lambda_dice=dice)

def july(logits, mask):
    return (0.4 * F.mse_loss(logits.sigmoid(), mask)
            + 0.7 * F.binary_cross_entropy_with_logits(logits, mask))

base = sam.build("zero", lesson.settings)
with torch.no_grad():
    embedding = base.image_encoder(pair["x"])
    logits = sam_judge.answer(base, embedding, pair["box"], pair["mask"].shape[-2:],
                              lesson.settings)
sizes = {}
for name, term in {"cross-entropy": weighted(1, 0), "Dice": weighted(0, 1)}.items():
    pushed = logits.clone().requires_grad_()
    term(pushed, pair["mask"]).backward()
    sizes[name] = float(pushed.grad.norm())
    inside = float((pushed.grad.abs() * pair["mask"]).sum() / pushed.grad.abs().sum())
    print(f"{name:14s} length of the gradient {sizes[name]:.5f}, {inside:.0%} of it on the lesion")
    lesson.record(**{f"inside_{name.lower().replace('-', '_')}": inside})
lesson.record(dice_over_ce=sizes["Dice"] / sizes["cross-entropy"],
              lesion_share=float(pair["mask"].mean()))
print(f"the lesion is {pair['mask'].mean():.1%} of the picture")

# %% [markdown]
# Cross-entropy is a mean over *all* pixels, so a small lesion makes small gradients; Dice divides by the
# size of the lesion. Where the gradient falls differs less than one might think, since the box already
# settles most of the background. What differs is the length: if Dice's is the larger, "0.5 and 0.5"
# is already a vote for Dice, and 0.2 : 0.8 is a stronger one than it looks. The ratio is one of these
# pictures at this moment and moves as the model learns. Hence the expectation: between mixtures little
# difference, since Dice has a say in all of them; the ends may differ.
#
# Now the grid, at its cheapest: the decoder alone on embeddings that are computed once, one run each,
# all from the same start, with the same order, boxes and rate, the one chosen for 1 : 1.

# %%
grid = {"CE": weighted(1, 0), "0.8 CE\n0.2 Dice": weighted(0.8, 0.2),
        "0.5 CE\n0.5 Dice": weighted(0.5, 0.5), "0.2 CE\n0.8 Dice": weighted(0.2, 0.8),
        "Dice": weighted(0, 1), "0.4 MSE\n0.7 CE": july}
held = sam.slices_of(task, "validation", arm, lesson.settings, lesson.seed)

def settings_of(name):
    return TrainConfig(steps=lesson.steps, batch_size=lesson.batch_size, weight_decay=0.01,
                       lr=lesson.rate or l03.chosen_rate(name), warmup=lesson.steps // 20,
                       seed=lesson.seed)

def step_with(term, encode):
    def step(model, batch):
        size = batch["mask"].shape[-2:]
        return term(sam_judge.answer(model, encode(batch["x"]), batch["box"], size,
                                     lesson.settings), batch["mask"])
    return step

# %%
items = sam_judge.Frames(train, lesson.settings, lesson.jitter)
encode = PrefixCache(base.image_encoder, half=True)
untrained = sam_judge.judge(base, encode, held, lesson.settings)["jitter 5 %"].dice
scores = {}
for k, (name, term) in enumerate(grid.items()):
    torch.manual_seed(lesson.seed)
    trained = sam.build("decoder", lesson.settings)
    fit(trained, step_with(term, encode), items, settings_of("decoder"),
        out=lesson.out / f"weights{k}")
    scores[name] = sam_judge.judge(trained, encode, held, lesson.settings)["jitter 5 %"].dice
    print(f"{name.replace(chr(10), ' + '):20s} {scores[name].mean():.3f}")

# %%
fig, (ax,) = viz.figure(1, 1, width=8, height=3.2)
viz.compare_arms(ax, scores, ylabel="Dice per validation patient", one_run=True,
                 baseline=("untrained", untrained.mean()))
lesson.show(fig, "weights", "Dice on validation patients for six weightings of the loss, one run "
            "each with intervals over patients, and a dashed line for the untrained model.");
means = {name: dice.mean() for name, dice in scores.items()}
mixtures = [value for name, value in means.items() if "CE\n" in name]
swept = l03.committed()
seed_range = float(np.ptp(swept["decoder"].mean(1)))
lesson.record(weights_range=max(means.values()) - min(means.values()),
              mixtures_range=max(mixtures) - min(mixtures), decoder_seed_range=seed_range,
              weights={name.replace("\n", " + "): value for name, value in means.items()})
print(f"range of the six {max(means.values()) - min(means.values()):.3f}, of the three mixtures "
      f"{max(mixtures) - min(mixtures):.3f}; of five seeds at 1 : 1 in the sweep {seed_range:.3f}")

# %% [markdown]
# **How to read it.** One run, a handful of validation patients: the picture is marked for what it is.
# The last number is the yardstick: how far the *same* loss moves when only the seed changes (longer
# runs, the lesson's test patients). Where a range is of that size, this grid cannot rank anything
# inside it. The learning rate was tuned for 1 : 1, which favours it.
#
# And what the grid cannot repair: with the loss of section 2.1 of the lesson, which compares a
# prediction with itself, *every* pair of weights is useless. Weights are the last thing to tune.
#
# ## 3 · Slices that see each other
#
# A tumour goes on in the next slice, and SAM sees one at a time. Wu et al. (2023) give it the third
# axis with a *space-depth transpose*: within a block, the attention that runs over the positions of
# a slice is applied a second time with axes swapped, over the slices at each position, and the two
# results are added. The report tried this and dropped it as too complex. Here is a small relative:
# one module of its own, in one place, as large as the adapters beside it.
#
# It stands **right behind the frozen prefix**. There the features of the neighbours come from the
# cache, and are no more than looked up; only the middle slice goes on through the rest of the
# encoder. Its output layer starts at **zero**, as LoRA's $B$ does, so the model starts as it was.

# %% tags=["export"]
class DepthAttention(nn.Module):
    """Every position of a slice asks the same position of the slices around it."""

    def __init__(self, dim, width=32, depth=3):
        super().__init__()
        self.depth, self.norm = depth, nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, width) for _ in range(3))
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):  # (N * depth, dim, h, w), slices running fastest -> (N, dim, h, w)
        middle = x[self.depth // 2 :: self.depth]
        stack = self.norm(x.unflatten(0, (-1, self.depth)).permute(0, 3, 4, 1, 2))
        asked = self.query(stack[..., self.depth // 2, :]).unsqueeze(-2)  # (N, h, w, 1, width)
        found = F.scaled_dot_product_attention(asked, self.key(stack), self.value(stack))
        return middle + self.out(found.squeeze(-2)).permute(0, 3, 1, 2)

def with_depth(encoder, layer, width):
    """Put it before the first block of a layer, in place: the slices meet there."""
    blocks = encoder.layers[layer].blocks
    dim = blocks[0].mlp.norm.normalized_shape[0]
    blocks[0] = nn.Sequential(DepthAttention(dim, width).to(blocks[0].mlp.fc1.weight), blocks[0])

# %% [markdown]
# There is no code for *which* slice is which: above and below are treated alike, and the middle one is
# known by asking. The three arms differ in what is fed to it:
#
# - **alone**: LoRA as in the lesson, without the module;
# - **neighbours**: LoRA and the module, with the slices above and below (2 mm away in the drawn
#   patients);
# - **itself thrice**: the same module and as many parameters, but all three slices are the middle one.
#
# The last is the control. If it does as well as the second, what helped was not the third axis but
# the extra parameters. An item carries its three slices where colours would be.

# %%
feeds = {"alone": [1], "neighbours": [0, 1, 2], "itself thrice": [1, 1, 1]}

def build(name):
    torch.manual_seed(lesson.seed)
    model = sam.build("lora", lesson.settings)
    if name != "alone":
        with_depth(model.image_encoder, lesson.first_layer, lesson.width)
    cache = PrefixCache(model.image_encoder, half=True)

    def encode(x):  # (N, 3 slices, h, w): each slice becomes a grey picture of its own
        some = x[:, feeds[name]].flatten(0, 1)[:, None]
        return cache(some.expand(-1, 3, -1, -1).contiguous())
    return model, encode

# %%
from medtut.data.brats_men import MEN, MenSlices

def triples(part, scans=("t1n", "t2f")):
    """Slices well inside the lesion, each with the ones below and above as colours."""
    found = MenSlices(task.part(part), MEN, policy="all", region=task.region)
    at = {key: i for i, key in enumerate(found.index)}
    items = []
    for case in dict.fromkeys(name for name, *_ in found.index):
        levels = sorted({z for name, z, _ in found.index if name == case})
        spread = np.linspace(0, len(levels) - 1, lesson.slices + 2).round().astype(int)[1:-1]
        for z, scan in [(levels[i], scan) for i in spread for scan in scans]:
            middle = found[at[case, z, scan]]
            near = [found[at.get((case, z + d, scan), at[case, z, scan])] for d in (-1, 0, 1)]
            items.append(middle | {"image": np.stack([one["image"] for one in near], -1)})
    return items

inside, test = triples("train"), triples("test")
fig, axes = viz.figure(1, 3, width=7, height=2.6)
for ax, d, word in zip(axes, range(3), ("below", "middle", "above")):
    viz.show_slice(ax, test[1]["image"][..., d], f"{word}, {test[1]['modality']}")
    if word == "middle":
        ax.contour(test[1]["mask"], [0.5], colors=viz.ORANGE, linewidths=1)
lesson.show(fig, "triple", "Three neighbouring slices of one drawn patient, with the outline of the "
            "lesion on the middle one.");

# %% [markdown]
# First the books, and whether it starts where it should: before any training, all three arms must give
# the *same* embedding. Then one step, to see that it moves.

# %%
x = sam_judge.Frames(test[:1], lesson.settings, 0.0)[0]["x"][None]
starts, sizes = {}, {}
for name in feeds:
    model, encode = build(name)
    with torch.no_grad():
        starts[name] = encode(x)
    sizes[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
module = model.image_encoder.layers[lesson.first_layer].blocks[0][0]
dim, added = module.norm.weight.numel(), sizes["neighbours"] - sizes["alone"]
formula = 2 * dim + 3 * (dim + 1) * lesson.width + (lesson.width + 1) * dim
start = max(float((y - starts["alone"]).abs().max()) for y in starts.values())
encode(x).square().mean().backward()
lesson.record(depth_parameters=added, lora_parameters=sizes["alone"], start_difference=start,
              out_moves=float(module.out.weight.grad.abs().max()) > 0)
print(f"norm {2 * dim:,} + query, key, value {3 * (dim + 1) * lesson.width:,} + output "
      f"{(lesson.width + 1) * dim:,} = {formula:,}; counted {added:,}; LoRA has {sizes['alone']:,}")
print(f"largest difference of the embeddings at the start: {start:.1e}")
assert added == formula

# %% [markdown]
# With $w$ the width and $d$ the channels: $2d$ for the norm, $3(d+1)w$ for query, key and value, $(w+1)d$
# on the way out. Now one run each: the same LoRA initialisation, order, boxes, steps and rate, the one
# chosen for LoRA alone.

# %%
depth = {}
for name in feeds:
    model, encode = build(name)
    result = fit(model, sam.loss_of(sam.DESIGNS["lora"], encode, lesson.settings),
                 sam_judge.Frames(inside, lesson.settings, lesson.jitter), settings_of("lora"),
                 out=lesson.out / name.replace(" ", "_"))
    depth[name] = sam_judge.judge(model, encode, test, lesson.settings,
                                  seed=lesson.seed)["jitter 5 %"].dice
    key = name.replace(" ", "_")
    lesson.record(**{f"dice_{key}": depth[name].mean(), f"seconds_{key}": result.seconds})
    print(f"{name:14s} Dice {depth[name].mean():.3f}   {result.seconds:.0f} s")

# %%
fig, (left, right) = viz.figure(1, 2, width=8.5, height=3.4)
viz.compare_arms(left, {name.replace(" ", "\n"): dice for name, dice in depth.items()},
                 ylabel="Dice per test patient", one_run=True)
low, high = (f(np.concatenate(list(depth.values()))) for f in (np.min, np.max))
right.plot([low, high], [low, high], color=viz.GREY, ls="--", lw=1, marker="")
for name, marker in {"neighbours": "o", "itself thrice": "s"}.items():
    right.plot(depth["alone"], depth[name], ls="none", marker=marker, label=name)
right.set(xlabel="alone", ylabel="with the module", aspect="equal")
right.legend(frameon=False, fontsize=8)
right.set_title("a point is a patient; one run, not evidence", fontsize=9, color=viz.VERMILION)
lesson.show(fig, "depth", "Left: Dice of LoRA alone, with attention to the neighbouring slices, and "
            "with attention to itself, one run each. Right: the scores with the module against "
            "those without, patient by patient, with a dashed line where both are equal.");

# %%
from medtut.evaluate import interval

spread = float(np.ptp(swept["lora"].mean(1)))
for text, (one, other) in {"depth_minus_alone": ("neighbours", "alone"),
                           "depth_minus_control": ("neighbours", "itself thrice")}.items():
    gain = depth[one] - depth[other]
    low, high = interval(gain)
    lesson.record(**{text: gain.mean(), f"{text}_low": low, f"{text}_high": high})
    print(f"{one} minus {other}: {gain.mean():+.3f} (over patients {low:+.3f} to {high:+.3f}), "
          f"better for {(gain > 0).sum()} of {len(gain)}")
within = bool(abs((depth["neighbours"] - depth["itself thrice"]).mean()) <= spread)
lesson.record(lora_seed_range=spread, within_seed_range=within)
print(f"five seeds of LoRA in the sweep: a range of {spread:.3f}; neighbours minus control is",
      "within it" if within else "beyond it")
lesson.finish()

# %% [markdown]
# **An honest reading.** The difference that asks about the *third axis* is the second one, neighbours
# minus control. If it lies within the range of five seeds, nothing has been found, in either
# direction, and the interval over patients does not help: it knows nothing of seeds. If it lies
# beyond, five seeds are worth their time, with a rate tuned for each arm. A module that
# starts at zero also starts *slowly*: in a dozen steps it has hardly begun, so a null result here is
# weak evidence against the idea.
#
# Three things this run cannot show at all. The box already tells where the lesion is, which is much
# of what a neighbour could tell; the gain should be sought where the prompt is poor. The slices
# were taken from inside the lesion; at its ends, where one neighbour is empty, is where depth should
# matter most. And the drawn scans are clean, while real ones have slices that only their neighbours
# explain.
#
# What the report called too complex is some twenty lines, because the module stands in *one* place. A
# transpose in every block, as Wu et al. have it, needs all slices of a stack in memory through the whole
# encoder: by section 1, that is a batch, at full price per slice. That is a good reason to drop it,
# and a better one than complexity.
#
# **To take away.** Count the bytes where the gradient flows. Accumulate before you shrink the idea.
# Look at gradients, not at weights. Give an added module a control without the information.
#
# **Left out on purpose:** memories that carry *masks* from slice to slice, as MedSAM2 does; 2.5-D
# input, with neighbours as colours, which needs no module at all and would be the next control;
# tuning any of this until it wins.
#
# **Sources.** Chikumbu, *Fine Tuning SAM Through LoRA*, UCT 2024 (the project of lesson 03). Wu et
# al., *Medical SAM Adapter*, arXiv:2304.12620. Zhang and Liu, *SAMed*, arXiv:2304.13785. Kirillov et
# al., *Segment Anything*, arXiv:2304.02643. Chen et al., *Training Deep Nets with Sublinear Memory
# Cost*, arXiv:1604.06174 (checkpointing). Milletari et al., *V-Net*, arXiv:1606.04797 (Dice loss).
