# %% [markdown]
# # Bonus 01 · DoRA and PiSSA
#
# <!-- medtut:colab --><!-- /medtut:colab -->
#
# **Question.** LoRA adds $\frac{\alpha}{r}BA$ to a frozen matrix and starts at $B = 0$. Two
# relatives change one of these choices each: DoRA changes *what* is trained, PiSSA changes
# *where it starts*. What does that do, and what does it cost?
#
# **You will be able to** write both in a few lines; count their parameters; say why a PiSSA
# adapter cannot be handed to somebody who has the original weights, and how to save it so
# that it can; and judge a claim of "faster convergence" by asking for the learning rate.
#
# **You need** lesson 01. No GPU.
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
steps = None
probe_steps = None
batch_size = None
rank = None
alpha = None
train_slices = None
test_slices = None
rates = None

# %%
import copy

import torch
from torch import nn
from torch.nn import functional as F

from medtut import viz
from medtut.course import open_lesson
from medtut.course.lessons import l01
from medtut.lora import LoRALinear, ledger, load_adapter, save_adapter, update_norm
from medtut.models.vit import load_dense_vit
from medtut.train import TrainConfig, fit

lesson = open_lesson(
    "bonus/01_dora_pissa", profile=profile, seed=seed, data=data, out=out, steps=steps,
    probe_steps=probe_steps, batch_size=batch_size, rank=rank, alpha=alpha,
    train_slices=train_slices, test_slices=test_slices, rates=rates,
)
lesson

# %% [markdown]
# ## 1 · DoRA: length and direction apart
#
# DoRA (Liu et al., 2024) writes every row of the weight as a length times a direction. The
# low-rank update turns the direction; the lengths $m$, one number for each output, are
# trained on their own:
#
# $$ W' = m \odot \frac{V}{\lVert V \rVert_\text{row}}, \qquad
# V = W + \frac{\alpha}{r} B A, \qquad m_0 = \lVert W \rVert_\text{row} $$
#
# With $B = 0$ and $m = m_0$ it starts as the old layer. The norm in the denominator is
# treated as a constant in the backward pass (section 4.3 of the paper: it saves memory and
# hardly changes the result), hence the `detach`. The paper writes norms of columns; its
# public code and Hugging Face peft take one per output, which is a row of PyTorch's
# (out, in) weight, and so do we.

# %% tags=["export"]
class DoRALinear(nn.Module):
    """y = W' x + b, W' = m V / |V|, V = W + (alpha / r) B A, |V| by row."""

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        self.m = nn.Parameter(base.weight.norm(dim=1))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.scale = alpha / r

    def forward(self, x):  # (..., in) -> (..., out)
        V = self.base.weight + self.scale * self.B @ self.A
        length = V.norm(dim=1).detach()  # (out,)
        return F.linear(x, V * (self.m / length)[:, None], self.base.bias)

# %% [markdown]
# ## 2 · PiSSA: start at the large singular values
#
# PiSSA (Meng et al., 2024) keeps LoRA's form and changes the start. The singular value
# decomposition $W = U S V^\top$ is cut after $r$ terms. The large part becomes the factors,
# split evenly, and the rest, the *residual*, is frozen:
#
# $$ A_0 = \sqrt{\tfrac{r}{\alpha} S_{:r}}\, V_{:r}^\top, \qquad B_0 = U_{:r}
# \sqrt{\tfrac{r}{\alpha} S_{:r}}, \qquad W_\text{res} = W - \tfrac{\alpha}{r} B_0 A_0 $$
#
# The layer starts as the old one, because what was taken out of $W$ is in the factors. But
# neither factor is zero: both have a gradient from the first step, and what is trained is
# the part of the weight that acts most strongly.

# %% tags=["export"]
class PiSSALinear(nn.Module):
    """y = W_res x + b + (alpha / r) B A x; B A starts as the top r of W's SVD."""

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / r
        U, S, Vh = torch.linalg.svd(base.weight.detach(), full_matrices=False)
        root = (S[:r] / self.scale).sqrt()
        self.A = nn.Parameter(root[:, None] * Vh[:r])
        self.B = nn.Parameter(U[:, :r] * root)
        taken = self.scale * self.B.detach() @ self.A.detach()
        self.register_buffer("residual", base.weight.detach() - taken)

    def forward(self, x):  # (..., in) -> (..., out)
        y = F.linear(x, self.residual, self.base.bias)
        return y + self.scale * (x @ self.A.T) @ self.B.T

# %% [markdown]
# Now against the package, on a real query matrix, with factors moved away from their start
# by the same random step (at $B = 0$ almost every mistake is invisible). The package
# computes the same functions in another order: DoRA scales the output instead of the
# weight, PiSSA subtracts the frozen first factors instead of storing a residual.

# %%
torch.manual_seed(lesson.seed)
query = load_dense_vit().blocks[0].attn.query
x, start, moved = torch.randn(32, query.in_features), {}, {}
for name, Hand in {"dora": DoRALinear, "pissa": PiSSALinear}.items():
    hand = Hand(copy.deepcopy(query), lesson.rank, lesson.alpha)
    package = LoRALinear(copy.deepcopy(query), lesson.rank, lesson.alpha, variant=name)
    start[name] = (hand(x) - query(x)).abs().max().item()
    with torch.no_grad():
        hand.A.add_(0.1 * torch.randn_like(hand.A))
        hand.B.add_(0.1 * torch.randn_like(hand.B))
        package.A.copy_(hand.A)
        package.B.copy_(hand.B)
        if name == "dora":
            package.lora_magnitude.copy_(hand.m.mul_(1.1))
    moved[name] = (hand(x) - package(x)).abs().max().item()
    print(f"{name:6s} start against base {start[name]:.1e}   hand against package "
          f"{moved[name]:.1e}   outputs up to {hand(x).abs().max():.1f}")
lesson.record(start_difference=start, max_difference_to_package=moved)

# %% [markdown]
# Lesson 01's LoRA starts at exactly zero difference, and so does this DoRA: with $B = 0$ the
# ratio of the two norms is one to the last bit. PiSSA takes a product out of $W$ and adds it
# again in the forward pass, so a rounding error is left. What does each train? We ask the ledger, with all queries and values of the model
# adapted and the head trained too, as in lesson 01.

# %%
def adapt(method):
    torch.manual_seed(lesson.seed)
    model = load_dense_vit()
    l01.prepare(model, method, lesson.rank, lesson.alpha)
    return model

methods = ("lora", "dora", "pissa")
counts = {m: ledger(adapt(m), head="^head").rows["adapter"].parameters for m in methods}
lesson.record(adapter_parameters=counts)
for name, count in counts.items():
    print(f"{name:6s} {count:7,d} adapter parameters, {count - counts['lora']:+,d} to LoRA")

# %% [markdown]
# DoRA trains one number more for each output of an adapted matrix. PiSSA trains as many as
# LoRA, and needs $W_\text{res}$, or $A_0$ and $B_0$, beside them. The price of DoRA is in
# time and memory rather than in parameters: the norm of $V$ needs the full product $BA$ in
# every step.
#
# ## 3 · The same task, three starts
#
# The task is lesson 01's: the small vision transformer, pretrained on T1 slices, learns the
# T2 and FLAIR slices. Rank, α, data and order of the batches are the same for all three.
# First we measure how far one step of AdamW moves the adapted weights at the same learning
# rate, then we take a few steps at every rate of one grid.

# %%
target = l01.load_task(lesson.settings, seed=lesson.seed)

def run(method, steps, rate, schedule):
    model = adapt(method)
    config = TrainConfig(steps=steps, batch_size=lesson.batch_size, lr=rate,
                         schedule=schedule, seed=lesson.seed)
    result = fit(model, l01.loss_fn, target.train, config, progress=False)
    return model, [row["loss"] for row in result.history if row["event"] == "step"]

norms, probes = {}, {}
for m in methods:
    first, _ = run(m, 1, lesson.rates[0], "constant")
    norms[m] = sum(n**2 for n in update_norm(first).values()) ** 0.5
    probes[m] = [run(m, lesson.probe_steps, r, "constant")[1] for r in lesson.rates]
late = {m: [sum(p[-5:]) / len(p[-5:]) for p in probes[m]] for m in methods}
drop = {m: [p[0] - end for p, end in zip(probes[m], late[m])] for m in methods}
lesson.record(first_update_norm=norms, first_update_ratio=norms["pissa"] / norms["lora"],
              drop_by_rate=drop, probe_rates=lesson.rates,
              pissa_drops_more=[p > q for p, q in zip(drop["pissa"], drop["lora"])])
print("norm of the first update:", {m: round(n, 3) for m, n in norms.items()},
      f"  PiSSA / LoRA {norms['pissa'] / norms['lora']:.2f}")

# %%
fig, (left, right) = viz.figure(1, 2, width=8.5, height=3.3)
middle = len(lesson.rates) // 2
chosen = {lesson.rates[0]: 0, lesson.rates[middle]: middle}
colours = {"lora": viz.BLUE, "dora": viz.GREEN, "pissa": viz.VERMILION}
for m, style in (("lora", "-"), ("pissa", "--")):
    for rate, k in chosen.items():
        left.plot(range(1, lesson.probe_steps + 1), probes[m][k], style, ms=3.5,
                  color=colours[m], marker="o" if k else "^", label=f"{m}, rate {rate:g}")
for m, marker, style in zip(methods, "osD", ("-", ":", "--")):
    right.plot(lesson.rates, drop[m], style, color=colours[m], marker=marker, label=m)
left.set(xlabel="step", xlim=(0, lesson.probe_steps + 1), ylabel="cross-entropy, training batch")
right.set(xlabel="learning rate", xscale="log",
          ylabel=f"drop of the loss in {lesson.probe_steps} steps")
for ax in (left, right):
    ax.legend(frameon=False, fontsize=8)
    ax.set_title("one run, not evidence", fontsize=9, color=viz.VERMILION)
lesson.show(fig, "first_steps", "Left: training loss of LoRA and PiSSA over the first steps "
            "at two learning rates. Right: drop of the loss against the learning rate for "
            "LoRA, DoRA and PiSSA.");

# %% [markdown]
# Read the left picture first. At the small rate PiSSA's loss falls earlier, as the paper
# reports. The first update offers a reason: at the same learning rate PiSSA moves the weights
# further than LoRA does, by the factor printed above. AdamW moves every entry of a factor by
# roughly the learning rate, whatever its gradient; the other factor decides what that does
# to the product, and PiSSA's factors are large from the start while LoRA's $B$ is zero. So
# part of the head start is likely a larger step. The right picture asks what remains when every
# method may choose its rate: where LoRA does best, its loss has fallen at least as far as
# PiSSA's, and the largest rate harms all three. DoRA can hardly be told from LoRA at the
# rates that work.
#
# Now a training of each, at the rate of the grid with the lowest loss at the end of those
# first steps. The test slices had no part in that choice.

# %%
models, scores, best = {}, {}, {}
for m in methods:
    best[m] = lesson.rates[min(range(len(lesson.rates)), key=late[m].__getitem__)]
    models[m], losses = run(m, lesson.steps, best[m], "cosine")
    scores[m] = l01.slice_scores(models[m], target.test)
    lesson.record(**{f"score_{m}": scores[m].mean(), f"final_loss_{m}": losses[-1]})
    print(f"{m:6s} rate {best[m]:g}   Dice {scores[m].mean():.3f}")
lesson.record(chosen_rate=best)
unadapted = l01.slice_scores(load_dense_vit(), target.test).mean()
lesson.record(score_unadapted=unadapted)

fig, axes = viz.figure(1, 1, width=6, height=3.2)
viz.compare_arms(axes[0], {f"{m}, rate {best[m]:g}": scores[m] for m in methods},
                 ylabel="Dice on T2 + FLAIR", baseline=("unadapted", unadapted), one_run=True)
lesson.show(fig, "arms", "Dice on the target test slices after LoRA, DoRA and PiSSA, one "
            "seed each with intervals over slices; the unadapted model as a dashed line.");

# %% [markdown]
# All three are far above the unadapted model and close to each other. The bars are intervals
# over slices of *one* seed, so they do not say how another seed would fall; a ranking of
# these three would need at least five, as in section 4.2 of lesson 01. The papers report
# gains of both over LoRA on language models many times this size, and DoRA on a few
# vision-language tasks; at this scale we can neither confirm nor deny them.
#
# ## 4 · Handing over a PiSSA adapter
#
# Suppose you train PiSSA and send $A$ and $B$ to a colleague who has the original model.
# In your layer they sit beside $W_\text{res}$; in the colleague's beside $W$. We do it, head
# included, and look at the score.

# %%
from safetensors.torch import load_file

folder = save_adapter(models["pissa"], lesson.out / "pissa_adapter", extra=["head"])
tensors = load_file(folder / "adapter_model.safetensors")
key = "base_model.model.blocks.0.attn.query.lora_{}.weight"
print("A in the file:", tuple(tensors[key.format("A")].shape),
      "  B in the file:", tuple(tensors[key.format("B")].shape))

naive = adapt("lora")  # original weights, plain LoRA, and PiSSA's factors put into it
naive.head.load_state_dict(models["pissa"].head.state_dict())
trained = dict(models["pissa"].named_parameters())
with torch.no_grad():
    for name, parameter in naive.named_parameters():
        if "lora_" in name:
            parameter.copy_(trained[name])
wrong = l01.slice_scores(naive, target.test).mean()
s = torch.linalg.svdvals(load_dense_vit().blocks[0].attn.query.weight.detach())
lesson.record(file_rank=tensors[key.format("A")].shape[0], score_naive_file=wrong,
              top_r_share=(s[: lesson.rank] ** 2).sum() / (s**2).sum())
print(f"trained PiSSA {scores['pissa'].mean():.3f}   attached naively {wrong:.3f}")
print(f"squared norm in the top {lesson.rank} directions of the first query matrix: "
      f"{lesson.metrics['top_r_share']:.1%}")

# %% [markdown]
# No error, no warning, a worse model: the naive one counts the principal part twice, once
# in $W$, where it still is, and once in $BA$. How much that hurts depends on the share of
# the weight that sits in its top $r$ directions, the last number above: the steeper the
# spectrum, the more is counted twice. What the receiver of the original weights needs is the
# *change*, and that is again a low-rank matrix, of twice the rank:
#
# $$ \Delta W = \tfrac{\alpha}{r}\,(BA - B_0A_0) = \tfrac{\alpha}{r}
# \begin{bmatrix} B & -B_0 \end{bmatrix} \begin{bmatrix} A \\ A_0 \end{bmatrix} $$
#
# That is what `save_adapter` wrote: an ordinary LoRA adapter of rank $2r$, with α doubled
# too so that the scale stays the same. We load it into fresh original weights twice: as our
# package does, which recognises PiSSA and can go on training it, and as any LoRA reader
# would, without our extra file.

# %%
import shutil
import warnings

ours = load_dense_vit()
load_adapter(ours, folder)
plain_folder = lesson.out / "pissa_as_plain_lora"
shutil.copytree(folder, plain_folder, dirs_exist_ok=True)
(plain_folder / "medtut_base.json").unlink()
plain = load_dense_vit()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns that the base cannot be checked
    load_adapter(plain, plain_folder)
picture = target.test.tensors[0][:8]
with torch.no_grad():
    want = models["pissa"].eval()(picture)
    gaps = [(m.eval()(picture) - want).abs().max().item() for m in (ours, plain)]
lesson.record(round_trip_difference=gaps[0], plain_lora_difference=gaps[1])
print(ours.blocks[0].attn.query)
print(plain.blocks[0].attn.query)
print("largest difference of the outputs:", gaps)

# %%
lesson.finish()

# %% [markdown]
# The file belongs to the original weights again, bit for bit the same outputs, in a layout
# that Hugging Face peft reads too. Its factors take twice the room of a LoRA file's at the
# same training rank, which is the price of leaving the base alone.
#
# **To take away.** DoRA: a few more parameters, a dearer step. PiSSA: another start, no more
# trained parameters, and a file that must be written as a difference. Faster convergence is
# a statement about a method *and* a learning rate; ask for both.
#
# **Left out on purpose:** the combinations with quantised weights (QDoRA, QPiSSA).
#
# **Sources.** Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, arXiv:2402.09353.
# Meng et al., *PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
# Language Models*, arXiv:2404.02948. Hu et al., *LoRA*, arXiv:2106.09685.
