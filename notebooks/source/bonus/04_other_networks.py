# %% [markdown]
# # Bonus 04 · Other networks, and what trained weights are worth
#
# <!-- medtut:colab --><!-- /medtut:colab -->
#
# **Question.** The report of lesson 04 announces a comparison with ResNet and DenseNet. Which of them
# should get the adapters? And is that the question that matters, when its own network was trained from
# random weights?
#
# **You will be able to** count LoRA on any convolutional network before building it; say what the
# trained weights contribute and what the method does, by changing one at a time; and recognise three
# ways in which BatchNorm and adapters get into each other's way.
#
# **You need** lesson 04. No GPU.
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
weights = None
side = None
precision = None
copies = None
lesions = None
plain_share = None
drawn_share = None
memory_mb = None
folds = None
train_patients = None
test_patients = None
steps = None
batch_size = None
seeds = None
rank = None
rate_lora = None
rate_full = None
longer = None

# %%
import copy

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from medtut import viz
from medtut.course import open_lesson
from medtut.course.lessons import vgg, vgg_pictures
from medtut.data.assets import AssetUnavailable, fetch
from medtut.lora import load_adapter, save_adapter
from medtut.models.prefix import PrefixCache, first_trainable, stages
from medtut.models.vgg import adapt, build_other, head_name, load_features, to_input, vgg16
from medtut.train import TrainConfig, fit

lesson = open_lesson(
    "bonus/04_other_networks", profile=profile, seed=seed, data=data, out=out, weights=weights,
    side=side, precision=precision, copies=copies, lesions=lesions, plain_share=plain_share,
    drawn_share=drawn_share, memory_mb=memory_mb, folds=folds, train_patients=train_patients,
    test_patients=test_patients, steps=steps, batch_size=batch_size, seeds=seeds, rank=rank,
    rate_lora=rate_lora, rate_full=rate_full, longer=longer,
)
lesson

# %% [markdown]
# ## 1 · The books, before anything is built
#
# A convolution with a $k \times k$ kernel from $c_{in}$ to $c_{out}$ channels is a matrix of $c_{out}$
# rows and $k^2 c_{in}$ columns, applied at every pixel. So LoRA of rank $r$ on it has
#
# $$r\,(k^2 c_{in} + c_{out})$$
#
# parameters, whatever the size of the picture. VGG16 has 3 × 3 kernels only. ResNet18 begins with a 7 ×
# 7 one and has 1 × 1 shortcuts. DenseNet121 is mostly 1 × 1: every layer squeezes all that came before
# it to 128 channels and adds 32 new ones by a 3 × 3. We sum the formula over the convolutions of each,
# and compare with what the package counts; on PyTorch's *meta* device that takes no memory.

# %%
# NBVAL_CHECK_OUTPUT
KINDS = ("vgg16", "resnet18", "densenet121")
counted = {}
for kind in KINDS:
    with torch.device("meta"):
        net = vgg16(4) if kind == "vgg16" else build_other(kind, norm="running")
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    by_hand = sum(8 * (c.kernel_size[0] ** 2 * c.in_channels + c.out_channels) for c in convs)
    weights_of = sum(c.weight.numel() for c in convs)
    counted[kind] = adapt(net, "conv", r=8).parameters
    print(f"{kind:12s}{len(convs):4d} convolutions of {weights_of:10,} weights; LoRA r = 8 "
          f"{counted[kind]:7,}, {counted[kind] / weights_of:6.2%}")
    assert counted[kind] == by_hand

# %%
lesson.record(**{f"lora_{kind}": count for kind, count in counted.items()})

# %% [markdown]
# Read the last column. LoRA saves most where layers are wide and few. DenseNet's 120 convolutions are
# narrow: rank 8 into 32 output channels is a quarter of all there can be, and so the *smallest* of the
# three networks needs the *largest* adapter. "Rank 8" is not the same amount of freedom everywhere.
# What counts is $r$ against $\min(k^2 c_{in}, c_{out})$.
#
# ## 2 · What the trained weights are worth
#
# A plain race of three networks mixes two things: the architecture, and what it learned on a million
# photographs. We keep them apart.
#
# - **VGG16, ImageNet's convolutions**: the ones of lesson 04. Blocks 1 to 4 stay frozen.
# - **VGG16, random**: the *same* network and adapters on convolutions drawn at random (He). Its
#   distance from the first is what the weights are worth, and nothing else.
# - **ResNet18, random** and **DenseNet121, random**: with BatchNorm on running statistics.
#
# Each is trained twice: **LoRA** of rank 8 (VGG16: in block 5; the others: in every convolution) and
# **full** (VGG16: the whole of block 5; the others: every weight). The head learns in each of them.
#
# The course's file of ImageNet weights holds VGG16's convolutions only. For the other two there are
# none offline, and random ones take their place. **Nothing below says how good a trained ResNet is.**
# With a network, `weights="torchvision"` loads all three from torchvision, and the same cells compare
# trained with trained.

# %% tags=["export"]
def make(kind, source, where, seed, settings, norm=None):
    """A network of four classes, from a source of weights, and what of it learns."""
    trained = source != "random"
    if kind == "vgg16":
        model, blocks = vgg16(head="pooled", dropout=0.0, seed=seed), (5,)
    else:
        norm = norm or ("frozen" if trained else "running")
        model, blocks = build_other(kind, norm=norm, seed=seed), (1, 2, 3, 4, 5)
    if trained:
        load_features(model, source)
    if where == "lora":
        adapt(model, "conv", r=settings.rank, blocks=blocks)
    elif kind == "vgg16":  # what lies below block 5 stays as it is
        model.requires_grad_(False)
        for part in (model.features[24:], model.classifier):
            part.requires_grad_(True)
    return model

def look(model, images):
    """(N, side, side) uint8 -> what this network reads, where it is."""
    grey = torch.as_tensor(images).to(next(model.parameters()).device).float() / 255
    return to_input(grey, getattr(model, "convention", "torchvision"))

# %% [markdown]
# A network with trained weights gets its BatchNorms frozen, with the means and variances of ImageNet;
# one without has to find its own. Section 3 asks what happens otherwise. Colour order and range follow
# the weights (Keras' for the file of the course, torchvision's for the others), which `load_features`
# notes on the model.
#
# Training is the lesson's: cross-entropy with a little smoothing, classes drawn evenly, other looks and
# drawn lesions among the pictures. **The learning rates are stated, not searched**: one for all LoRA
# arms and one for all full ones.

# %% tags=["export"]
def train(model, items, settings, seed, rate):
    """Train what learns in a model; frozen beginnings run once per picture."""
    cache = PrefixCache(model, True, settings.memory_mb)

    def loss(_, batch):
        logits = cache(look(model, batch["image"]))
        return F.cross_entropy(logits.float(), batch["label"], label_smoothing=0.05)

    size = settings.batch_size
    config = TrainConfig(
        steps=len(items) // size, batch_size=size, lr=rate, weight_decay=0.01,
        warmup=len(items) // size // 10, precision=vgg.precision(settings), seed=seed)
    return cache, fit(model, loss, items, config, progress=False)

def answers(cache, images, settings):
    """(N,) the class said of each picture, in eval mode."""
    model = cache.encoder.eval()
    with torch.inference_mode(), vgg.autocast(settings):
        parts = [cache(look(model, some)) for some in np.array_split(images, -(-len(images) // 32))]
    return torch.cat(parts).argmax(1).cpu().numpy()

# %%
settings = lesson.settings
task = vgg_pictures.load_task(settings)
learn = np.sort(np.concatenate([task.train, task.validation]))  # nothing is chosen
seen = vgg_pictures.views(task, learn, settings, plain=False)
truth, own_truth = task.labels[task.test], task.labels[learn]
rates = {"lora": settings.rate_lora, "full": settings.rate_full}

def run(kind, source, where, seed, norm=None, model=None, factor=1):
    """One training; right or wrong by test picture, and the balanced score on its own pictures."""
    torch.manual_seed(seed)  # of the adapters
    model = make(kind, source, where, seed, settings, norm) if model is None else model
    length = factor * settings.steps * settings.batch_size
    items = vgg_pictures.Balanced(seen, length, seed, settings)
    cache, result = train(model, items, settings, seed, rates[where])
    own = vgg.by_case(answers(cache, task.images[learn], settings), own_truth).mean()
    cases = vgg.by_case(answers(cache, task.images[task.test], settings), truth)
    return {"cases": cases, "own": own, "seconds": result.seconds, "cache": cache}

for word, labels in {"trained on": own_truth, "tested on": truth}.items():
    print(f"{word:11s}", dict(zip(vgg_pictures.CLASSES, np.bincount(labels, minlength=4).tolist())))

# %% [markdown]
# No rate and no step is chosen by a score, so the validation pictures may learn as well. Scores are
# balanced accuracies (each class counts the same; a constant answer gets 0.25) on the *other scanner*.
# The score on the training pictures stands beside it: a network that has not learned those has no
# chance on others, and one that knows them and fails elsewhere has another trouble.

# %%
from tqdm.auto import tqdm

real = settings.weights
try:
    fetch("vgg16-imagenet-conv") if real == "asset" else None
except AssetUnavailable:
    real = "random"
    lesson.fell_back("ImageNet's convolutions", "random weights, so that no network is trained")
sources = {"vgg16": [real, "random"]} | {
    kind: [real, "random"] if real == "torchvision" else ["random"] for kind in KINDS[1:]}
arms = list(dict.fromkeys((kind, source, where) for kind in KINDS for source in sources[kind]
                          for where in ("lora", "full")))
print("weights:", sources)

# %%
runs = {}
for kind, source, where in tqdm(arms):
    several = [run(kind, source, where, settings.seed + k) for k in range(settings.seeds)]
    name = f"{kind}_{'random' if source == 'random' else 'trained'}_{where}"
    runs[name] = {key: np.array([one[key] for one in several])
                  for key in ("cases", "own", "seconds")}
    last = several[-1]["cache"].encoder
    if name == "resnet18_random_lora":
        running = several  # section 3 asks them more
    size = sum(p.numel() for p in last.parameters() if p.requires_grad)
    score = runs[name]["cases"].mean(1)
    lesson.record(**{name: score.mean(), f"{name}_own": runs[name]["own"].mean()})
    print(f"{name:28s}{size:11,} learn   own pictures {runs[name]['own'].mean():.3f}   other scanner "
          f"{score.mean():.3f} ({score.min():.3f} to {score.max():.3f})   {runs[name]['seconds'].mean():4.0f} s")

# %%
short = {"vgg16": "VGG16", "resnet18": "ResNet18", "densenet121": "Dense121", "trained": "ImageNet"}
fig, (ax,) = viz.figure(1, 1, width=9, height=3.4)
viz.compare_arms(ax, {"\n".join(short.get(part, part) for part in name.split("_")): found["cases"]
                      for name, found in runs.items()}, ylabel="balanced accuracy", one_run=True)
ax.axhline(0.25, color=viz.GREY, ls=":", lw=1, marker="")
ax.set_title(f"{settings.seeds} run(s) of each, {settings.steps} steps: a hint, not evidence",
             fontsize=9, color=viz.VERMILION)
lesson.show(fig, "arms", "Balanced accuracy on the other scanner of each network with LoRA and with full "
            "training, a point a run, with intervals over pictures and runs; dotted, a constant answer.");

# %%
from medtut.evaluate import interval

def differ(one, other):
    """Mean difference of two arms and its interval, over pictures and runs."""
    gap = runs[one]["cases"] - runs[other]["cases"]
    return float(gap.mean()), *interval(gap)

pairs = {f"{kind}_lora_minus_full_{kind_of}": (f"{kind}_{kind_of}_lora", f"{kind}_{kind_of}_full")
         for kind in KINDS for kind_of in ("trained", "random")}
pairs |= {f"weights_worth_{where}": (f"vgg16_trained_{where}", f"vgg16_random_{where}")
          for where in ("lora", "full")}
for name, (one, other) in pairs.items():
    if one in runs and other in runs:
        mean, low, high = differ(one, other)
        lesson.record(**{name: mean, f"{name}_low": low, f"{name}_high": high})
        print(f"{name:36s}{mean:+.3f} ({low:+.3f} to {high:+.3f})")

# %% [markdown]
# **What was expected, before the run.** The same VGG16 with the same adapters should lose most of what
# it has when its weights are random: the adapters can turn features, and there are none to turn. LoRA
# should cost nothing against full training where the weights are good, and something where everything
# must change. Networks made for training from scratch (BatchNorm, shortcuts) should beat a random
# VGG16.
#
# **How to read it.** The two lines `weights_worth` compare one network with itself: the difference is
# the photographs. `lora_minus_full` compares two ways to train from one start. An interval that holds
# zero says that these pictures and runs do not tell them apart, and three runs tell little. What must
# *not* be read off: an order of architectures. VGG16 learns in its last block only, the others
# everywhere; the rates are stated; these are few steps. Compare the two columns as well: where the own
# pictures are known and the other scanner is not, the trouble is the shift of lesson 04, and no other
# network cures it.
#
# ### Is it only the number of steps?
#
# From random weights a network has more to learn, so equal steps are not fair to it. What a reviewer
# would ask first: give it more. One run of ResNet18, full, with several times the steps.

# %%
patient = run("resnet18", "random", "full", settings.seed, factor=settings.longer)
first = runs["resnet18_random_full"]
lesson.record(longer_score=patient["cases"].mean(), longer_own=patient["own"])
for text, own, score in (
        (f"{settings.steps} steps", first["own"][0], first["cases"][0].mean()),
        (f"{settings.longer * settings.steps} steps", patient["own"], patient["cases"].mean())):
    print(f"ResNet18 from random weights, {text:10s} own pictures {own:.3f}, other scanner {score:.3f}")

# %% [markdown]
# If the score on the own pictures rises and the other scanner's does not, the network has learned this
# scanner by heart. If both rise, part of what section 2 charged to the weights was a lack of time.
# Either way: a few hundred drawn pictures are no million photographs, and this is one run.
#
# ## 3 · BatchNorm and adapters
#
# VGG16 has no BatchNorm; ResNet has 20, DenseNet 121. A BatchNorm holds four vectors for its channels.
# Scale and shift are parameters: LoRA freezes them. Mean and variance are *buffers*: no gradient
# reaches them, no `requires_grad_(False)` stops them, and in training mode they follow every batch.
# "The base is frozen" is then not true. Three consequences.
#
# ### 3.1 Hardly anything can be kept
#
# A layer in training mode whose output depends on the rest of the batch cannot be computed once and
# stored. With adapters in the last block only:

# %%
# NBVAL_CHECK_OUTPUT
for kind in KINDS[1:]:
    for norm in ("running", "frozen"):
        with torch.device("meta"):
            net = build_other(kind, norm=norm).train()
            adapt(net, "conv", blocks=(5,))
        print(f"{kind:12s}{norm:8s} {first_trainable(net):2d} of {len(stages(net))} stages run once")

# %% [markdown]
# With running statistics only the convolution below the first BatchNorm is safe.
#
# ### 3.2 Which statistics?
#
# Frozen statistics are right when they are *somebody's*: those of the data that the weights were
# trained on. Random weights never saw any. Four ways, ResNet18 with LoRA on random weights throughout:
#
# - **running**: batch statistics in training, running means in use, as above;
# - **never seen data**: frozen at mean 0 and variance 1, so that there is no normalisation at all;
# - **measured, then frozen**: one pass over the training pictures first, without labels;
# - **running, then measured on the other scanner**: the trained network of the first kind; its means
#   and variances are replaced by those of the *unlabelled* test pictures (Li et al., 2016). This looks
#   at the test set, though not at its labels, so it is a different claim: it needs a batch of the new
#   scanner before the first answer.

# %% tags=["export"]
@torch.no_grad()
def measure(model, batches):
    """Means and variances of all BatchNorms: the average over batches, momentum or not."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None
    model.train()
    for x in batches:
        model(x)
    return model.eval()

def still(model):
    """Replace every BatchNorm by a fixed scale and shift with its numbers, in place."""
    for name, m in list(model.named_modules()):
        if isinstance(m, nn.BatchNorm2d):
            fixed = FrozenBatchNorm2d(m.num_features, m.eps)
            fixed.load_state_dict(m.state_dict())
            model.set_submodule(name, fixed)
    return model

# %%
def batches(model, images):
    order = np.random.default_rng(0).permutation(len(images))  # no batch of one class
    return (look(model, images[at]) for at in np.array_split(order, max(1, len(images) // 32)))

norms = {"running": [], "never seen\ndata": [], "measured,\nfrozen": [],
         "running,\nother scanner": []}
for k, one in enumerate(running):
    s = settings.seed + k
    norms["running"].append(one["cases"])
    norms["never seen\ndata"].append(run("resnet18", "random", "lora", s, norm="frozen")["cases"])
    bare = build_other("resnet18", norm="running", seed=s)
    bare = still(measure(bare, batches(bare, seen.images)))
    torch.manual_seed(s)  # the same adapters at the start
    adapt(bare, "conv", r=settings.rank)
    norms["measured,\nfrozen"].append(run("resnet18", "random", "lora", s, model=bare)["cases"])
    other = copy.deepcopy(one["cache"].encoder)
    other = measure(other, batches(other, task.images[task.test]))
    said = answers(PrefixCache(other), task.images[task.test], settings)
    norms["running,\nother scanner"].append(vgg.by_case(said, truth))

# %%
norms = {name: np.array(cases) for name, cases in norms.items()}
keys = ("norm_running", "norm_never", "norm_measured", "norm_other")
lesson.record(**{key: cases.mean() for key, cases in zip(keys, norms.values())})
fig, (ax,) = viz.figure(1, 1, width=7, height=3.2)
viz.compare_arms(ax, norms, ylabel="balanced accuracy", one_run=True)
ax.axhline(0.25, color=viz.GREY, ls=":", lw=1, marker="")
ax.set_title(f"ResNet18, LoRA, random weights; {settings.seeds} run(s) of each: a hint, not evidence",
             fontsize=9, color=viz.VERMILION)
lesson.show(fig, "norms", "Balanced accuracy on the other scanner of ResNet18 with LoRA under four ways to "
            "treat the statistics of BatchNorm; dotted, a constant answer.");
for key, other in (("norm_never", "never seen\ndata"), ("norm_measured", "measured,\nfrozen"),
                   ("norm_other", "running,\nother scanner")):
    gap = norms[other] - norms["running"]
    low, high = interval(gap)
    lesson.record(**{f"{key}_minus_running": gap.mean()})
    print(f"{other.replace(chr(10), ' '):24s} minus running {gap.mean():+.3f} ({low:+.3f} to {high:+.3f})")

# %% [markdown]
# **How to read it.** "Never seen data" is what `norm="frozen"` means for a network without weights:
# twenty layers without any normalisation, each shortcut adding to the last, so that the numbers grow
# from block to block. It is the one to avoid; what it costs in so few steps, the line above says. Between *running* and *measured* the
# difference is what the means follow: in the second they are those of the start and stay while the
# adapters move what they normalise. The last bar uses no label, and changes what the network believes
# about brightness. Where it differs from the first, part of the "shift" is two numbers a channel; where
# it does not, the trouble lies deeper.
#
# ### 3.3 What the adapter file leaves behind
#
# An adapter file holds `A`, `B` and the head: what had a gradient. Running means had none. We save the
# first of the networks above, load the file into the base it was trained from, and ask both the same
# question. The remedy is to name the BatchNorms when saving, as one names the head.

# %%
moved = running[0]["cache"].encoder
norms_of = [n for n, m in moved.named_modules() if isinstance(m, nn.BatchNorm2d)]
head = head_name(moved)
before = answers(PrefixCache(moved), task.images[task.test], settings)
for word, extra in {"usual": [head], "with_norms": [head, *norms_of]}.items():
    folder = save_adapter(moved, lesson.out / f"adapter_{word}", extra=extra)
    fresh = build_other("resnet18", norm="running", seed=settings.seed)
    load_adapter(fresh, folder)
    after = answers(PrefixCache(fresh), task.images[task.test], settings)
    changed, score = (after != before).mean(), vgg.by_case(after, truth).mean()
    lesson.record(**{"answers_changed" if word == "usual" else "answers_changed_with_norms": changed})
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6
    print(f"{word:11s}{size:5.2f} MB   answers changed {changed:6.1%}   balanced accuracy "
          f"{score:.3f} (before {vgg.by_case(before, truth).mean():.3f})")
lesson.finish()

# %% [markdown]
# The usual file loads without a word, and the fingerprint of the base agrees, because a fingerprint is
# taken of *weights*, and those did not change. The network is another one all the same. The same holds
# for any library that stores what was trained: after loading, ask a few pictures whose answers you
# know. With the BatchNorms named, the file answers as the network did. Frozen statistics avoid the
# question: then the base is frozen in fact.
#
# **To take away.** Ask what the weights are before you ask which network. Count $r$ against the width
# of the layer. Equal steps favour whoever starts ahead; say so, or give the other one time. Freeze
# BatchNorm over trained weights, measure it over random ones, and put it into the file if it moved.
#
# **Left out on purpose:** trained ResNets and DenseNets, which need a network
# (`weights="torchvision"`); a learning rate searched for each arm, without which no order *within* the
# random networks should be read; GroupNorm, which has no statistics to keep.
#
# **Sources.** Zeng, *Enhancing Brain Tumor Classification: VGG16 with LoRA*, 2024 (the project of
# lesson 04). Simonyan and Zisserman, arXiv:1409.1556. He et al., *Deep Residual Learning*,
# arXiv:1512.03385. Huang et al., *Densely Connected Convolutional Networks*, arXiv:1608.06993. Ioffe
# and Szegedy, *Batch Normalization*, arXiv:1502.03167. Li et al., *Revisiting Batch Normalization for
# Practical Domain Adaptation*, arXiv:1603.04779. Hu et al., *LoRA*, arXiv:2106.09685.
