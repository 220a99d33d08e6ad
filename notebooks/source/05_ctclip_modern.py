# %% [markdown]
# # Lesson 05 · CT-CLIP modernised: four switches, and what each of them really turns
#
# <!-- medtut:colab --><!-- /medtut:colab -->
#
# **Question.** A public project brings a model of chest CT and reports up to date: FlashAttention,
# RMSNorm, SwiGLU, SigLIP. It reports a quarter less memory, 1.07 times the speed, and steadier training
# in small batches. Which of its four switches does what its name says? And what do the four bring, once
# each of them does, and they are turned one at a time?
#
# **You will be able to**
# - ask a model from the outside whether a part of it does anything;
# - write attention that never holds its matrix, and show that it is the same function;
# - tell what two contrastive losses ask for, and compare them at one temperature;
# - judge zero-shot answers: prompts, thresholds, intervals that resample, a simple baseline beside them;
# - adapt such a model to another scanner with LoRA, and ask a single CT your own questions on a laptop.
#
# **You need** lesson 01, or to know what LoRA is. No GPU.
#
# <!-- medtut:cost --><!-- /medtut:cost -->

# %%
# Only where the course is not installed, such as Colab; a torch that is there stays.
import importlib.util

if importlib.util.find_spec("medtut") is None:
    # medtut:install
    # /medtut:install

# %% tags=["parameters"]
profile = "quick"
seed = 0
data = None
out = None
weights = None
text = None
image = None
spacing = None
train = None
dev = None
test = None
target_train = None
target_test = None
epochs = None
batch_size = None
depth = None
precision = None
rank = None
target_steps = None
warmup = None
clip_norm = None
validate_every = None
validate_samples = None

# %% [markdown]
# Every value above may stay `None`: it then comes from the profile. `data` takes a folder in the layout of
# CT-RATE (`data_scripts/ct_rate.py` gets and checks one), which then stands for the target of section 4.4.
#
# **Words of this lesson**
# - *HU*, Hounsfield units: the numbers of a CT; air is −1000, water 0.
# - *AUROC*: how often a patient with a finding scores above one without; a coin has 0.5. *Macro*: the mean over
#   findings, each counting the same; *weighted*: by how many patients have it. *AUPRC*: mean precision over all
#   thresholds; chance is the share of patients who have the finding.
# - *Dev*: patients on whom rates and thresholds are chosen, never judged.
# - *R@5*: share of reports whose own scan is among the five nearest. *MAP@5*: how far the findings of the five nearest
#   scans agree with one's own.
# - *RMSNorm*: LayerNorm without the mean. *GEGLU*, *SwiGLU*: feed-forward layers in which one product opens or shuts
#   another.
# - *SigLIP*: a loss that asks of each pair of scan and report whether it belongs together, by a sigmoid; CLIP's asks
#   which one belongs, by a *softmax*. *Temperature*: the factor on cosines before a loss (their scale).
# - *QK-norm*: queries and keys get length one before they meet. *Position bias*: a number added to their product, for
#   where two tokens lie.

# %%
import numpy as np
import torch

from medtut import viz, viz_ct
from medtut.course import open_lesson
from medtut.course.exercises import exercise
from medtut.course.lessons import ct, ct_target, l05
from medtut.data.ct_rate import FINDINGS
from medtut.models.ctclip import load_ctclip

lesson = open_lesson(
    "05_ctclip_modern", profile=profile, seed=seed, data=data, out=out, weights=weights,
    text=text, image=image, spacing=spacing, train=train, dev=dev, test=test,
    target_train=target_train, target_test=target_test, epochs=epochs,
    batch_size=batch_size, depth=depth, precision=precision, rank=rank,
    target_steps=target_steps, warmup=warmup, clip_norm=clip_norm,
    validate_every=validate_every, validate_samples=validate_samples,
)
settings = lesson.settings
lesson

# %% [markdown]
# ## 1 · The system as published
#
# CT-CLIP (Hamamci et al., arXiv:2403.17834) learns from pairs of a chest CT and its report. Its image
# tower, **CT-ViT**, cuts a volume of 240 × 480 × 480 voxels into 24³ = 13,824 blocks of 10 × 20 × 20, makes each a
# token, and lets tokens attend in two ways: four layers among the 576 blocks of a slab, then four along the 24 blocks
# above each other. A BERT reads the report. Both become vectors of length one, and training makes the vector of a scan
# resemble that of its own report more than those of the others. Nobody draws an outline or writes a label.
# Afterwards one *asks*: is the scan nearer to "There is pleural effusion." or to "There is no pleural effusion."?
#
# The re-implementation of this lesson (R. Liang and others, `renjie-liang/CTCLIP_MODERN`, read at commit 2babb98) is
# built from the same blocks. We build what its code builds on the *meta* device, where tensors have a shape and take no
# memory, and send a small copy backwards to see which parameters the loss reaches.

# %%
# NBVAL_CHECK_OUTPUT
from medtut.course.lessons import ct_published as pub

books, counted = pub.published_books()
print(books)
print(f"with its text tower {counted['published_parameters']:,} parameters, "
      f"{counted['published_dead_share']:.1%} of them out of the loss's reach")
for kind, n in pub.projection_diet().items():
    print(f"from tokens to 512 numbers, {kind:10s} {n:11,} parameters")
lesson.record(**counted)

# %% [markdown]
# Half of the image side, and 38 % of the whole, asks for gradients and gets none. A decoder, from the time when such a
# tower was an autoencoder, is called by nobody; both projections exist twice; a network computes position biases that
# are not added; each attention keeps a norm for a context it never has. PyTorch's Adam passes over a parameter without
# gradient, and what is not called takes no time (the bias network is called). The price is 0.7 GB of memory, and of
# every checkpoint, in float32.
#
# The largest *living* matrix is easily overlooked. The tokens, averaged over depth, are 24 × 24 × 512 = 294,912
# numbers, and one matrix takes them to 512: six times as many parameters as the encoder below it. A product of rank 64
# needs an eighth; pooling by attention, with a query for each head, needs 1/286. Ours takes that one.
#
# ### What the tables say by themselves
#
# Before running anything it pays to do the arithmetic of a table, here those of the README (commit 81bee44).

# %%
# NBVAL_CHECK_OUTPUT
told = pub.source_arithmetic()
lesson.record(**told)
print("speed-up", {part: round(told[f"source_speedup_{part}"], 3) for part in pub.PARTS})
print(f"saved {told['source_memory_saved_gb']:.2f} GB; attention matrices {told['attention_matrix_gb']:.2f} GB")
print(f"share of the 45 minutes that steps take: {told['source_epoch_compute_share']:.2f} at batch 8, "
      f"{told['source_epoch_compute_share_16']:.2f} at batch 16")
print(f"47,319 + 3,038 = {told['source_volumes_sum']:,}; CT-RATE has 50,188")
print(f"precision 0.294 and recall 0.666 make an F1 of {told['source_implied_f1']:.3f}, not 0.450")
for name in ("auroc", "recall"):
    print(f"{name:6s} +{told[f'source_{name}_points']:.1f} points, or "
          f"+{told[f'source_{name}_relative_gain']:.1f} % of the baseline")

# %%
fig, (ax,) = viz.figure(1, 1, width=7.5, height=3)
looks = {"as it was": (viz.BLUE, -0.32), "all on": (viz.VERMILION, 0.04)}
for (arm, loss), (_, *milliseconds) in pub.EFFICIENCY.items():
    colour, shift = looks[arm]
    sigmoid = loss == "sigmoid"
    ax.bar(np.arange(3) + shift + 0.16 * sigmoid, milliseconds, 0.15, color=colour,
           alpha=0.55 if sigmoid else 1, hatch="//" if sigmoid else "", label=f"{arm}, {loss}")
for k, part in enumerate(pub.PARTS):
    ax.text(k, 60 + pub.EFFICIENCY["as it was", "softmax"][k + 1],
            f"{told[f'source_speedup_{part}']:.3f} ×", ha="center", fontsize=9)
ax.set_xticks(range(3), ["visual encoder", "backward", "whole step"])
ax.set(ylabel="ms, as published", ylim=(0, 1650))
ax.legend(frameon=False, fontsize=8, loc="upper left")
lesson.show(fig, "source_times", "Published milliseconds of visual encoder, backward pass and whole step for "
            "both designs and both losses: losses are alike, the new design is 6 to 7 percent shorter.");

# %% [markdown]
# - **1.07 is the visual encoder; the step is 1.06.** The two losses differ by a thousandth: none of the gain is theirs.
# - **The memory is the attention matrices.** 16 volumes, 24 planes, 8 heads, 4 layers, 576² numbers, once in float32
#   and once as a copy in float16: 24.5 GB of the 28.0 saved (22.8, if those are GB of 2³⁰ bytes). Little is left for
#   RMSNorm, SwiGLU and SigLIP.
# - **Most of an epoch is no step.** Of 45 minutes the faster steps save 1.2 at a batch of 8, or 0.6 at 16. The rest is
#   loading, validating and saving: look there first.
# - **Points and percent.** "+2.6 % AUROC" is a ratio, "+10.8 % recall" a difference. And the last row of the table,
#   everything on, has 0.616 where SigLIP alone has 0.620, from one seed each, without intervals.
# - **F1 comes from elsewhere**: from thresholds chosen on the evaluated labels, while precision and recall are taken at
#   0.5. At one threshold a mean of F1 over findings cannot exceed the F1 of the mean precision and recall.
# - **Some passages exclude each other.** 118.98 GB do not fit "2 × 80 GB" on a trainer for one GPU; a B200 has about
#   180. CT-RATE has 47,149 + 3,039 volumes. "BiomedBERT" and "GELU" are CXR-BERT and GEGLU in the code. CT-CLIP is
#   cited under the title of a paper on drugs; it is *Developing Generalist Foundation Models from a Multimodal Dataset
#   for 3D Computed Tomography*.
#
# Slips that any of us makes in a README, and none needs a GPU to be found.
#
# ### Autopsy: does a part do anything?
#
# **Proof and inference.** What the public code computes we compute again; that is proof. That the published runs did
# the same is inference. To a part one asks: *I move it, what else moves?* First the network for position biases, filled
# with random numbers; then the norms, counted by class and not by the name of a switch.

# %%
# NBVAL_CHECK_OUTPUT
change = pub.bias_change(ours=False)
print(f"bias network randomised: the published tokens change by {change}, "
      f"ours {'do change' if pub.bias_change(ours=True) > 1e-4 else 'do not change'}")
norms = pub.norm_counts()
print(f"all switches on: {norms['published_rms_norms']} RMSNorm and "
      f"{norms['published_layer_norms']} LayerNorm in the two stacks; "
      f"ours {norms['ours_rms_norms']} and {norms['ours_layer_norms']}")
half = pub.rms_in_float16()
for name, row in half.items():
    print(f"tokens of 0, 1 and 300 in float16, {name:9s}: {row['nan']} became NaN, {row['lost']} became 0")
lesson.record(published_bias_change=change, ours_bias_change=pub.bias_change(ours=True),
              published_rms_nan=half["published"]["nan"], **norms)

# %% [markdown]
# - **The bias** is computed in every forward pass and dropped: the line that adds it is commented out, and the call
#   does not hand it over. Not one bit moves. The original CT-CLIP adds it, so this baseline is another model than
#   CT-CLIP, and CT-CLIP's released weights would not mean the same in it.
# - **The norm switch** reaches the two norms at the ends of the stacks. With flash on, those before attention are
#   fixed; those before each feed-forward always are. (Without flash it is 18 of 26.) Whatever the last row of the table
#   shows, it is not the effect of RMSNorm.
# - **In float16** its eps of 10⁻⁸ is zero, and stands beside the root: zeros become 0/0. Squares overflow from 256 on,
#   and what is divided by infinity is 0. This trap is closed as long as the model runs under CUDA's autocast, as the
#   trainer does, because PyTorch then takes powers in float32. It opens with `model.half()`.
#
# Two defects do not show that way, since something does move: a switch that changes the function where it
# should change its cost, and a number that moves too little.

# %%
flash, smaller = pub.flash_differences(), pub.flash_differences(size=0.25)
print("flash on, relative difference of one attention over five seeds "
      f"{flash[:, 0].min():.2f} to {flash[:, 0].max():.2f}; float16 alone {flash[:, 1].max():.4f}; "
      f"with tokens a quarter as large {smaller[:, 0].mean():.2f}")

from medtut.models import contrastive
from medtut.models.published_ctclip import temperature_reach

reach = temperature_reach()
lesson.record(flash_relative_difference=flash[:, 0].mean(), temperature_moved=reach,
              flash_difference_small_tokens=smaller[:, 0].mean(),
              published_interval_width=pub.interval_width(resample=False))
print(f"Adam can move a number by {reach:.4f} in the whole run: the softmax's scale from 2.718 to "
      f"{np.exp(1 + reach):.3f}, SigLIP's bias from -10 to {reach - 10:.3f}")
apart = torch.eye(16)  # 16 scans and reports, told apart perfectly
for scale in (np.e, 10.0):
    loss = contrastive.softmax_loss(apart, apart, torch.tensor(scale).log())
    print(f"a perfect answer costs the softmax {loss:.4f} at scale {scale:.2f}")

# %% [markdown]
# - **The flash path is another function.** It drops the normalisation of queries and keys, their learned scales, and
#   the factor 8, and takes $q^\top k / \sqrt{32}$ instead. The kernel is exact, and such an attention is a good one;
#   but the table then compares two models and not two ways of computing one, and what was trained on one path means
#   something else on the other. The number belongs to this input, random tokens of size one, at PyTorch's initial
#   weights: without the normalisation of keys, smaller tokens make flatter attention, and the difference grows.
# - **The temperature stands still.** A step of Adam moves a number by about the learning rate, whatever its gradient.
#   At 1.25e-6, and 9,320 steps with warm-up and cosine, no number gets further than 0.006. So the softmax ran at 2.7
#   and SigLIP at 10 from the first step to the last. At 2.7 even a perfect answer costs 0.69 nats, and the loss goes on
#   pushing what is apart already. "SigLIP against softmax" was a comparison of two temperatures as well.
#
# Most of this can be found from outside, by a tool that knows nothing of CT. We hand over the small copy, a batch, its
# loss and its switches; and the bootstrap of the original CT-CLIP's evaluation, in which the resampling is commented
# out.

# %%
from functools import partial

from medtut.audit import Subject, audit

batch, reports = pub.small_batch(), {}
switches = {"theirs": {"norm": ({"rms": True, "flash": True}, {"flash": True}),
                       "feed-forward": ({"swiglu": True}, {})},
            "ours": {"norm": ({"norm": "rms"}, {"norm": "layer"}),
                     "feed-forward": ({"ffn": "swiglu"}, {"ffn": "geglu"})}}
for name, asked in switches.items():
    make = partial(pub.small_clip, name == "ours")
    pairs = {word: [partial(make, **how) for how in pair] for word, pair in asked.items()}
    reports[name] = audit(Subject(
        model=make(), batch=batch, forward=lambda model, batch: model(*batch), loss=pub.contrast,
        switches=pairs | {"position bias": "image_tower.bias"},
        bootstrap=pub.bootstrap_of(resample=name == "ours")))
    print(name, [f"{f.detector}: {f.where[:24]}" for f in reports[name].findings])
lesson.record(audit_findings=len(reports["theirs"].findings),
              audit_findings_ours=len(reports["ours"].findings))
reports["theirs"]

# %% [markdown]
# Four findings there, none in ours. The tool stays silent about the flash path and the temperature: it can see that
# a switch changes nothing, and cannot know that one *should not*. That takes a test which says so, like the
# one at the end of the next section.
#
# ## 2 · Built right
#
# ### 2.1 Attention that never holds its matrix
#
# For one query with logits $s_j$ the softmax needs the sum of all $e^{s_j}$, so it seems to need all logits at once. It
# does not (Milakov and Gimelshein, 2018). Walk over the keys in blocks, and keep three things: the largest logit $m$ so
# far, the sum $\ell$ and the mixture $o$ of values, both relative to $m$. For a block with logits $s_j$ and values
# $v_j$,
#
# $$m' = \max(m, \max_j s_j), \qquad \ell' = e^{m - m'} \ell + \sum_j e^{s_j - m'}, \qquad o' = e^{m - m'} o + \sum_j e^{s_j - m'} v_j,$$
#
# and the answer is $o / \ell$ at the end. That is what FlashAttention does on the chip (Dao et al., 2022). Below, 64
# keys in blocks of 8: after each block the answer is exactly the attention over the keys seen so far.

# %%
import math  # for your answer below

draw = torch.Generator().manual_seed(0)
logits, values = 2 * torch.randn(64, generator=draw), torch.randn(64, 2, generator=draw)
ends = list(range(8, 65, 8))
so_far = torch.stack([logits[:n].softmax(0) @ values[:n] for n in ends])
fig, axes = viz.figure(1, 2, width=8.5, height=2.8)
axes[0].plot(range(1, 65), logits, ".", color=viz.GREY, label="logits")
axes[0].step(ends, logits.view(8, 8).amax(1).cummax(0).values, where="pre", label="largest so far, m")
for k, style in enumerate(("-", "--")):
    line, = axes[1].plot(ends, so_far[:, k], style, marker="os"[k], label=f"answer, number {k + 1}")
    axes[1].axhline(logits.softmax(0) @ values[:, k], color=line.get_color(), lw=1, ls=":", marker="")
for ax in axes:
    ax.set_xlabel("keys seen")
    ax.set_xticks(ends)
    ax.legend(frameon=False, fontsize=8)
lesson.show(fig, "online", "Left, 64 logits and the largest of them so far, a rising step line. Right, two numbers of the "
            "answer after each block of 8 keys, which reach the whole softmax, dotted, at the last block.");
q1 = exercise("05.1")

# %% tags=["exercise"] medtut={"exercise": "05.1"}
def online_softmax(q, keys, values, block):
    ...

# %%
q1.check(online_softmax)

# %% [markdown]
# (*Not attempted* is no error: no later cell needs your answer. `q1.hint()` gives a first hint, called again the next.)
#
# Whenever $m$ steps up (left), everything summed so far shrinks by $e^{m - m'}$: here the last block has the largest
# logit, and turns the answer (right). Nothing is approximated.
#
# ### 2.2 The same function, and a proof of it
#
# Does CT-CLIP's attention fit into such a kernel? Its logits are $8 \cos(q_i, k_j)$ with learned scales, plus a bias
# $b_{ij}$. Normalise queries and keys *before*, hand over the factor and the bias, and it does: PyTorch's
# `scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=8)`. `medtut.models.ct_attention` has one module with
# three backends: written out; fused; and flash-attn, which adds no bias and therefore *refuses* one. "The same" means
# output and all gradients, with scales other than 1 and a bias, fixed or trained. Memory is what autograd keeps for the
# backward pass, which follows from shapes alone.

# %%
from medtut.lora import find_dead

ours = pub.small_clip(True)
dead = set(find_dead(ours, pub.contrast(ours, batch)))
difference, tokens = pub.fused_difference(), (36, 72, 144, 288, 576)
kept = pub.memory_curves(tokens, batch=8)
growth = {name: line[-1] / line[-2] for name, line in kept.items()}
lesson.record(ours_dead_parameters=sum(p.numel() for n, p in ours.named_parameters() if n in dead),
              fused_difference=difference, memory_explicit_growth=growth["written out"],
              memory_fused_growth=growth["fused"])
print(f"fused against written out: largest difference {difference:.0e}; parameters of ours without gradient: {len(dead)}")
print("twice the tokens, times the bytes:", {name: round(x, 2) for name, x in growth.items()})
fig, (ax,) = viz.figure(1, 1, width=6.5, height=3.2)
for (name, line), style in zip(kept.items(), ("-", "-", "--", ":")):
    ax.loglog(tokens, np.array(line) / 1e6, style, label=name)
ax.set_xticks(tokens, tokens, minor=False)
ax.minorticks_off()
ax.set(xlabel="tokens N in a plane", ylabel="MB kept, 8 planes")
ax.legend(frameon=False, fontsize=8)
lesson.show(fig, "memory", "Megabytes that one attention keeps for its gradient against tokens, both axes logarithmic: "
            "written out and with a trained bias it curves up to 104 and 109, fused it is a line up to 19.");

# %% [markdown]
# Fused, twice the tokens take twice the bytes; written out it tends to four times. At the 576 tokens of a published
# plane that is a factor of 5. A *fixed* bias is one matrix for all planes of a batch, however many. A *trained* bias
# wants a gradient for each of its N² numbers; on a CPU PyTorch then writes everything out, and the saving is gone. So
# "fused" is no promise: measure where you train (`medtut bench ctclip` prints this table for your device), or take
# rotary positions, which need no bias.
#
# ### 2.3 A norm that is everywhere
#
# $\text{RMSNorm}(x) = w \cdot x / \sqrt{\text{mean}(x^2) + \epsilon}$ leaves out LayerNorm's mean and its bias. Two
# details decide about float16: the square is taken in float32, and $\epsilon$ stands *under* the root.

# %%
q2 = exercise("05.2")

# %% tags=["exercise"] medtut={"exercise": "05.2"}
def rms_norm(x, weight, eps):
    ...

# %%
q2.check(rms_norm)

# %% [markdown]
# In ours one function makes every norm (`make_norm`), so a switch cannot miss one; a test counts them.
#
# ### 2.4 A gate, and a loss
#
# GEGLU and SwiGLU are $W_3\,(\varphi(W_1 x) \odot W_2 x)$ with GELU or SiLU for $\varphi$: the same three matrices. As
# published, GEGLU takes the second half of its weights for the gate and SwiGLU the first, so a checkpoint loads into
# the other and means something else; ours takes the first in both, and rounds the width from 1365 to 1408, a multiple
# of 64, which suits the matrix units of a GPU.
#
# The losses ask two questions of the cosines $c_{ij}$ of $B$ scans and $B$ reports. Softmax: *which* of the reports
# is it? SigLIP (Zhai et al., 2023) asks each pair by itself: *do these belong together?*
#
# $$\mathcal{L}_{\text{softmax}} = -\frac{1}{2B} \sum_i \left[\log \frac{e^{t c_{ii}}}{\sum_j e^{t c_{ij}}} + \log \frac{e^{t c_{ii}}}{\sum_j e^{t c_{ji}}}\right]$$
#
# $$\mathcal{L}_{\text{SigLIP}} = -\frac{1}{B} \sum_{ij} \log \sigma(y_{ij} (t\, c_{ij} + b)),\; y_{ij} = \pm 1.$$
#
# The second needs no sum over a row: it can be computed in chunks, or on several machines, without ever holding the $B
# \times B$ matrix. At the start, with vectors that know nothing of each other, it is $\log(1 + e^{10}) + (B - 1) \log(1
# + e^{-10})$.

# %%
# NBVAL_CHECK_OUTPUT
from medtut.models import contrastive

flops = {kind: pub.gated_flops(kind) for kind in ("geglu", "swiglu")}
print(f"operations of a feed-forward and its gradient, 64 tokens: {flops}")
lesson.record(swiglu_over_geglu_flops=flops["swiglu"] / flops["geglu"])
for b in (4, 16):
    image, text = torch.eye(2 * b).split(b)  # all at right angles
    scalars = torch.tensor(contrastive.LOG_SCALE), torch.tensor(contrastive.BIAS)
    whole, pieces = (contrastive.sigmoid_loss(image, text, *scalars, chunk=c) for c in (None, 2))
    closed = np.log1p(np.exp(10)) + (b - 1) * np.log1p(np.exp(-10))
    print(f"B = {b:2d}: SigLIP {whole:.3f}, in chunks of two {pieces:.3f}, closed form {closed:.3f}; "
          f"softmax {contrastive.softmax_loss(image, text, scalars[0]):.3f} = log B")
q3 = exercise("05.3")

# %% tags=["exercise"] medtut={"exercise": "05.3"}
def sigmoid_loss(image, text, log_scale, bias):
    ...

# %%
q3.check(sigmoid_loss)

# %% [markdown]
# Exactly as many operations: none of the speed-up is SwiGLU's. And the two losses start from unlike numbers (10 here,
# $\log B$ there), which says nothing about who learns faster. In this course both start at scale 10, and scale and bias
# have a learning rate of their own, so that they can move. That is the comparison of section 3.
#
# ### 2.5 What it costs, part by part
#
# `medtut bench ctclip` lets the published module and ours take turns in one run, with the same shapes, batch and
# optimizer, unprofiled. (The source's profiler waits for the GPU around every operation, which is part of what
# its table shows.) Here is its table by part and loss, as committed with the course.

# %%
for kind in ("gpu", "cpu"):
    result = pub.load_bench(kind)
    if result is None:
        print(f"{kind}: no table is committed; `medtut bench ctclip` on such a machine makes one")
        continue
    used, machine = result["settings"], result["machine"]
    print(f"{kind}: {machine['device'] if kind == 'gpu' else machine['cpu']}, shape {used['shape']}, batch {used['batch']}")
    for (arm, loss), seconds in pub.by_part(result).items():
        print(f"  {arm:12s} {loss:8s}", *(f"{p} {1e3 * s:7.1f} ms " for p, s in zip(pub.PARTS, seconds)))
    for arm, (memory, speed, parameters) in pub.by_cost(result).items():
        print(f"  {arm:25s} memory {memory:.2f} x, step {speed:.2f} x as fast, {parameters:10,} parameters")
    if kind == "gpu" and used["shape"] == "published" and result["memory_ratio"]:
        lesson.record(**{"gpu.memory_ratio": result["memory_ratio"], "gpu.step_speedup": result["step_speedup"]})

# %% [markdown]
# From softmax to sigmoid nothing should show but noise (here a few per cent): a loss is a matrix of $B \times B$
# cosines beside a tower of billions of operations. "same, fused" is the published function to rounding, so what it
# gains is the kernel's; "all on" is another function, and its gain has to be weighed against what it does to the
# answers, which is the next experiment. On a CPU "all on" also means bfloat16, and its whole step gains nothing in this
# table.
#
# The last rows are relative to the published module. Recomputing activations in the backward pass (checkpointing) takes
# the memory of "all on" from 0.75 to 0.41, and the step from 1.02 to 0.82. The projection diet shows in the parameters,
# 4.2 million, 3.1 with rank 64, 1.9 with attention pooling, and hardly in memory or time: at this narrow shape the
# matrix is small. At the published shape it is 151 million. What the diet costs in answers is asked in section 3.
#
# ## 3 · The ablation that is missing
#
# The source has one run for each row of its table and turns its switches on top of each other. Now that each of ours
# does what it says, they can be turned one at a time: two norms × two gates × two losses; and, for the claim that
# matters most, SigLIP in small batches, both losses at a batch of 4, 8, 32 and 64.
#
# **What stays the same.** All arms read the same 320 drawn scans (section 4.1 shows such) and their reports, the same
# number of times, whatever the batch. Each has its learning rate from one grid of three, chosen on dev patients by runs
# of half the length. Losses start at one temperature, SigLIP's bias at $-\log(B-1)$, and scale and bias have ten times
# the rate. All arms begin from the checkpoint's embedding of patches, frozen and computed once, and keep its text side;
# what is switched, trained from random weights, lies in between: both stacks, the pooling, the projection. Tokens are
# the largest of each 2 × 2 × 2, and arms are asked in four wordings, section 4.2 in one. That text side was pretrained
# with SigLIP's loss, which may favour SigLIP's arms. So an arm takes seconds, and five seeds of every arm are possible.
# `medtut sweep 05` makes them; two run here, live. In `full`, arms are trained as the source trains, where that
# applies: 300 steps of warm-up, gradients clipped at 0.5, and every half epoch a validation on 200 patients, of which
# the best weights stay.
#
# Three more arms change one other thing in "all on": LoRA of rank 8 in the *text* tower too (queries and values of its
# last two layers; whole reports in training, prompts in judging), and the projection that pooling by attention
# replaced, whole or as a product of low rank.

# %%
parts, target = l05.source_parts(settings), l05.target_parts(settings)
live = {}
for name in ("layer_geglu_softmax", "rms_swiglu_sigmoid"):
    model, result = ct.train_arm(name, lesson.seed, l05.chosen_rate(name), settings, parts, progress=True)
    live[name] = l05.macro(ct.arm_scores(model, parts["test"], settings), parts["test"].truth)
    print(f"{name}: {result.steps} steps, {result.seconds:.0f} s, macro AUROC {live[name]:.3f}")
scores = l05.committed("scores")
sweep_truth = l05.sweep_truth("rms_swiglu_sigmoid")
whole = [n for n in ct.DESIGNS if len(scores.get(n, ())) == len(scores["rms_swiglu_sigmoid"])]
tables = {name: l05.areas(scores[name], sweep_truth) for name in whole}
means = {name: table[:, 0].mean() for name, table in tables.items()}
if lesson.profile == "quick" and settings.weights == "small":
    gap = max(abs(tables[name][lesson.seed, 0] - live[name]) for name in live)
    lesson.record(live_minus_committed=gap)
    assert gap < 0.05, f"live and committed runs differ by {gap}"
lesson.record(**means)
effects = {"rms_minus_layer": ("rms", "layer"), "swiglu_minus_geglu": ("swiglu", "geglu"),
           "sigmoid_minus_softmax": ("sigmoid", "softmax")}
for name, (new, old) in effects.items():
    both = [sum(t for k, t in tables.items() if k in ct.CUBE and word in k.split("_")) / 4 for word in (new, old)]
    found = l05.contrast(*both)
    lesson.record(**dict(zip((name, f"{name}_low", f"{name}_high"), found)))
    print(f"{name:22s} {found[0]:+.4f} ({found[1]:+.4f} to {found[2]:+.4f})")

# %%
floor = l05.baseline(parts["train"], parts["dev"], parts["test"])
fig, axes = viz.figure(1, 2, width=9, height=3.6)
for line in (axes[0].axvline, axes[1].axhline):
    line(l05.macro(floor, parts["test"].truth), color=viz.GREY, lw=1, ls=":", marker="", label="histogram, labels")
for k, name in enumerate(ct.CUBE):
    colour = viz.VERMILION if name.endswith("sigmoid") else viz.BLUE
    low, high = l05.spread(tables[name])
    axes[0].plot(tables[name][:, 0], np.full(len(tables[name]), k), ".", color=colour, alpha=0.6)
    axes[0].plot([low, high], [k, k], "-", color=colour, marker="", lw=1.5)
said = {"softmax": "softmax", "sigmoid": "SigLIP"}
arms = [name.replace("_", ", ").replace("sigmoid", "SigLIP") for name in ct.CUBE]
axes[0].set_yticks(range(len(ct.CUBE)), arms, fontsize=8)
axes[0].set(xlabel="macro AUROC, zero-shot", title="each switch by itself")
sizes = (4, 8, 16, 32, 64)
for loss, colour in (("softmax", viz.BLUE), ("sigmoid", viz.VERMILION)):
    rows = [tables[f"rms_swiglu_{loss}" if b == 16 else f"{loss}_b{b}"] for b in sizes]
    ends = np.transpose([l05.spread(t) for t in rows])
    middle = np.array([t[:, 0].mean() for t in rows])
    axes[1].errorbar(sizes, middle, abs(ends - middle), capsize=3, label=said[loss], color=colour)
axes[1].set(xscale="log", xlabel="batch", ylabel="macro AUROC", title="loss and batch")
axes[1].set_xticks(sizes, map(str, sizes))
axes[1].minorticks_off()
axes[1].legend(frameon=False, fontsize=8)
lesson.show(fig, "ablation", "Left, macro AUROC of eight combinations of norm, gate and loss, five seeds as dots and "
            "intervals over patients and seeds. Right, both losses at batches of 4 to 64. Dotted: histogram, labels.");

# %%
small = l05.contrast(tables["sigmoid_b4"], tables["softmax_b4"])
lesson.record(**dict(zip(("small_batch_gain", "small_batch_gain_low", "small_batch_gain_high"), small)))
print("batch of 4, SigLIP minus softmax {:+.3f} ({:+.3f} to {:+.3f})".format(*small))
failed = l05.committed("failed")
for loss in ct.LOSSES:
    runs = np.concatenate([v for k, v in failed.items() if loss in k])
    spread = tables[f"{loss}_b4"][:, 0].std(ddof=1)
    lesson.record(**{f"diverged_share_{loss}": runs.mean(), f"seed_spread_{loss}_b4": spread})
    print(f"{loss}: {runs.sum():.0f} of {len(runs)} runs failed; at batch 4 seeds spread by {spread:.4f}")
gap = l05.spread_gap(tables["softmax_b4"], tables["sigmoid_b4"])
lesson.record(**dict(zip(("seed_spread_gap", "seed_spread_gap_low", "seed_spread_gap_high"), gap)))
print("spread of softmax minus that of SigLIP {:+.4f} ({:+.4f} to {:+.4f})".format(*gap))
for name, metric in l05.SINGLE_METRICS.items():
    if name not in tables:
        print(f"{name}: runs of all seeds are not committed; medtut sweep 05 --arms {name}")
        continue
    found = l05.contrast(tables[name], tables["rms_swiglu_sigmoid"])
    lesson.record(**dict(zip((metric, f"{metric}_low", f"{metric}_high"), found)))
    print(f"{name:15s} {means[name]:.3f}, {metric} {found[0]:+.3f} ({found[1]:+.3f} to {found[2]:+.3f})")

# %% [markdown]
# **Turned one at a time,** at one temperature and each with its own rate, SigLIP loses: −0.036 of macro AUROC (−0.050
# to −0.022), and −0.046 in batches of 4, where it was to win; arms' intervals overlap, but they share patients, and the
# paired difference excludes 0. The intervals of RMSNorm (−0.011, more than the 0.01 that we allowed) and SwiGLU
# (+0.006) hold 0; with SwiGLU and SigLIP together RMSNorm costs 0.021, so effects are not quite additive. None of the
# 80 runs of these sixteen arms failed (a loss that ends no lower than it began), and five seeds cannot tell the spreads
# apart. From 4 to 16 scans the batch shows nothing; 32 and 64 are worse with both losses, and make fewer steps (40 at
# 64), so batch and steps are not separated. Four of the sixteen arms chose the lowest rate of the grid (softmax at 4
# and 8, SigLIP at 8, and LayerNorm with GEGLU and SigLIP), so 1e-4 might serve them better; we did not try it.
#
# **The other three.** LoRA in the text tower cannot be told from a frozen one (−0.003, −0.026 to +0.014), and a run takes six
# times as long. The diet of section 1 has a price: the whole projection is better than pooling by attention, by 0.027 (+0.004 to
# +0.051), and a product of low rank is not (−0.009, −0.034 to +0.018). Both of these chose the lowest rate as well.
#
# Most arms are no better than a histogram of HU that has labels (0.649, dotted; section 4.2): these are differences
# among weak models, on drawn chests. What carries over is the protocol. It is no verdict on SigLIP at 32,768 pairs.
#
# ## 4 · Zero-shot on a laptop
#
# ### 4.1 The patients
#
# Chests of the course are drawn on two real CTs, `lung1` and `lung2` of the PyRadiomics test data (their own tumours
# taken out). Each patient is deformed individually and gets some of the 18 findings of CT-RATE, drawn in HU at cited
# sizes with the set's prevalences; the report is written from the same numbers. Files have CT-RATE's layout and go
# through the reader of the real set. **Two real bodies, many drawn diseases:** the checkpoint learned on the first, and
# every interval below is over drawn disease, not over people.

# %%
from medtut.data.ct_volume import SPACING, prepare, read_hu

real = prepare(read_hu(ct.real_chest()), settings.image, settings.spacing)[0]
test, sick = parts["test"], int(np.argmax(parts["test"].truth.sum(1)))
fig, axes = viz.figure(2, 3, width=6, height=4.2)
rows = {"drawn, source": test.volumes[sick], "drawn, target": target["target_test"].volumes[0], "real": real}
for k, (name, volume) in enumerate(rows.items()):
    for row, (word, window) in enumerate(viz_ct.WINDOWS.items()):
        viz_ct.show_slice(axes[3 * row + k], volume, settings.image[0] * 11 // 24, window, f"{name}, {word}")
lesson.show(fig, "patients", "One axial slice of a drawn patient of each scanner and of a real CT, above in the lung "
            "window, below in the soft tissue window.");
print(test.records[sick].findings[:400])

# %% [markdown]
# A reader of such files has to know one thing: are the numbers HU already? CT-RATE's first release stores HU + 1024 and
# says so in a table; its second stores HU, and a script that rescales again shifts everything by 1024, without
# an error (CT-CLIP, issue 50). Ours asks the numbers themselves; `audit` asks anybody's reader.

# %%
from medtut.data.ct_volume import CTError

try:
    read_hu(ct.real_chest(), 1.0, -1024.0)
except CTError as error:
    print(str(error)[:240])
twice = audit(Subject(rescale=lambda stored, slope, intercept: slope * stored + intercept))
twice

# %% [markdown]
# ### 4.2 Eighteen questions
#
# The checkpoint (2 MB) was pretrained by `data_scripts/pretrain_ctclip_small.py`, and its card says how. From reports
# alone a small tower stayed at chance in the minutes that a CPU has, so this one was also shown *outlines*, as
# ReXGroundingCT has them for CT-RATE, and reads patches by a histogram of HU in the place of 384 raw voxels. Two
# findings, the rarest, were **withheld**: no sentence that names them was read, no outline of theirs was used. Beside
# it stand a baseline without any network (logistic regression on the histogram of HU and 4³ mean densities, trained
# with labels) and a linear probe on the checkpoint's vectors, both with the labels of the 320 training scans.

# %%
from medtut.evaluate import zero_shot as zs
from medtut.models.text_tower import TEMPLATES

clip = load_ctclip(ct.weights_file(settings))
vectors = {name: ct.embed(clip, part.volumes) for name, part in parts.items()}
asked = TEMPLATES[:1]  # the published pair: "There is X.", "There is no X."
answers = {name: ct.zero_shot(clip, v, settings.text, asked) for name, v in vectors.items()}
truth = {name: part.truth for name, part in parts.items()}
probe = zs.linear_probe(vectors["train"], truth["train"], vectors["dev"], truth["dev"], vectors["test"])
judged = {word: zs.findings_report(found, truth["test"], names=FINDINGS) for word, found in
          {"zero-shot": answers["test"], "baseline": floor, "probe": probe.scores}.items()}
for word, report in judged.items():
    print("{:10s} macro AUROC {:.3f} ({:.3f} to {:.3f})".format(word, *report["macro"]["auroc"]))
    print(" " * 10, "macro AUPRC {:.3f} ({:.3f} to {:.3f});".format(*report["macro"]["auprc"]),
          *(f"weighted {key.upper()} {report['weighted'][key][0]:.3f}" for key in ("auroc", "auprc")))
    lesson.record(**{f"{word.replace('-', '_')}_{kind}_{key}": report[kind][key][0] for kind in ("macro", "weighted")
                     for key in ("auroc", "auprc")})
seen = l05.macro_visible(answers["test"], parts["test"])
chance = np.mean([one["prevalence"] for one in judged["probe"]["findings"].values() if one])
print(f"zero-shot, findings of at least 2 voxels: macro AUROC {seen:.3f}; chance of the macro AUPRC {chance:.3f}")

# %%
withheld = np.isin(FINDINGS, ct.WITHHELD)
one = l05.macro(answers["test"], truth["test"])
lesson.record(zero_shot_source=one, baseline_source=judged["baseline"]["macro"]["auroc"][0],
              probe_source=judged["probe"]["macro"]["auroc"][0],
              zero_shot_minus_baseline=one - judged["baseline"]["macro"]["auroc"][0],
              zero_shot_source_visible=seen, auprc_chance=chance,
              withheld_auroc=zs.macro_over(judged["zero-shot"], withheld)["auroc"][0],
              named_auroc=zs.macro_over(judged["zero-shot"], ~withheld)["auroc"][0],
              withheld_probe=zs.macro_over(judged["probe"], withheld)["auroc"][0])
fig, (ax,) = viz.figure(1, 1, width=8.5, height=5)
order = np.argsort(-zs.auroc(answers["test"], truth["test"]))
looks = {"zero-shot": (viz.VERMILION, "o"), "probe": (viz.BLUE, "s"), "baseline": (viz.GREY, "D")}
for shift, (word, (colour, marker)) in enumerate(looks.items()):
    at, numbers = l05.columns(judged[word], [FINDINGS[i] for i in order])
    ax.errorbar(numbers[0], at + 0.22 * (shift - 1), xerr=abs(numbers[1:] - numbers[0]), fmt=marker,
                color=colour, ms=4, lw=1, label=word)
said = [f"{FINDINGS[i]}{', withheld' if withheld[i] else ''} ({truth['test'][:, i].sum()})" for i in order]
ax.set_yticks(range(len(order)), said, fontsize=8)
ax.axvline(0.5, color=viz.BLACK, lw=1, ls=":", marker="")
ax.invert_yaxis()
ax.set_xlabel("AUROC on new patients of the source")
ax.legend(frameon=False, fontsize=9, loc="upper left")
lesson.show(fig, "findings", "AUROC with intervals of 18 findings for zero-shot, linear probe and baseline, sorted "
            "by zero-shot, with how many of the patients have each; two findings are marked as withheld.");

# %% [markdown]
# Two sentences reach 0.811, on the 16 named findings 0.866, as much as the probe. The 0.16 above the baseline are not
# "no labels against labels": the checkpoint learned from outlines and reports of 2,240 patients, the baseline from
# labels of 320. On the two **withheld** findings it has 0.37, with 3 and 12 patients no different from chance; the
# probe, with labels, has 0.87 there, so the vectors hold them and no word points at them. *Zero-shot* means that labels
# are unseen, not that findings are. Lung nodules stay at one half, also those of 16 mm and more. So size alone is not
# the reason; we have not found it. They are the most frequent finding, so the weighted mean (0.785) lies below the macro one. In
# AUPRC zero-shot has 0.717 and the histogram 0.367, where chance is 0.185.
#
# ### 4.3 Words, thresholds, neighbours
#
# Three things that decide about a zero-shot number without touching the model: the wording, the threshold, and what
# else is in the gallery. Thresholds for F1 are chosen on the dev patients and frozen; beside it 0.5, and what one gets
# by choosing on the test patients themselves, as CT-CLIP's script does.

# %%
from medtut.evaluate import retrieval

wordings = {yes.format("X"): l05.macro(ct.zero_shot(clip, vectors["test"], settings.text, [(yes, no)]), truth["test"])
            for yes, no in TEMPLATES}
for words, found in wordings.items():
    print(f"{words:38s} {found:.3f}")
every = ct.zero_shot(clip, vectors["test"], settings.text)  # the four together
gain = l05.contrast(*(l05.areas(x[None], truth["test"]) for x in (every, answers["test"])))
print(f"{'all four together':38s} {l05.macro(every, truth['test']):.3f},",
      "minus the first {:+.3f} ({:+.3f} to {:+.3f})".format(*gain))
cuts = {"chosen on dev": zs.choose_thresholds(answers["dev"], truth["dev"]), "one half": None,
        "chosen on test": zs.choose_thresholds(answers["test"], truth["test"])}
alarms = {word: zs.findings_report(answers["test"], truth["test"], cut)["macro"] for word, cut in cuts.items()}
for word, row in alarms.items():
    print(f"{word:15s} F1 {row['f1'][0]:.3f}, precision {row['precision'][0]:.3f}, recall {row['recall'][0]:.3f}")
with torch.no_grad():
    said = clip.encode_text(torch.from_numpy(ct.text_tower(settings.text).embed(test.texts()))).numpy()
own = retrieval.report_to_volume(said, vectors["test"], ks=(5,))
alike = retrieval.volume_to_volume(vectors["test"], truth["test"], ks=(5,))
print("report to volume, R@5 {:.3f} ({:.3f} to {:.3f})".format(*own["R@5"]["value"]), f"chance {own['R@5']['chance']:.3f}")
print("like volumes, MAP@5 {:.3f}".format(alike["MAP@5"]["value"][0]), f"chance {alike['MAP@5']['chance']:.3f}")

# %%
lesson.record(prompt_mismatch_loss=wordings["There is X."] - wordings["X is present."],
              prompt_ensemble=l05.macro(every, truth["test"]), prompt_ensemble_gain=gain[0],
              prompt_ensemble_gain_low=gain[1], prompt_ensemble_gain_high=gain[2],
              f1_dev_threshold=alarms["chosen on dev"]["f1"][0], f1_test_threshold=alarms["chosen on test"]["f1"][0],
              f1_at_half=alarms["one half"]["f1"][0], recall_at_half=alarms["one half"]["recall"][0],
              retrieval_r5=own["R@5"]["value"][0], retrieval_r5_chance=own["R@5"]["chance"],
              map5=alike["MAP@5"]["value"][0], map5_chance=alike["MAP@5"]["chance"])
q4 = exercise("05.4")

# %% tags=["exercise"] medtut={"exercise": "05.4"}
def choose_threshold(scores, truth):
    ...

# %%
q4.check(choose_threshold)

# %% [markdown]
# Another wording costs 0.05 to 0.07; the published one was among the sentences of the pretraining, the others were not.
# Averaging all four wordings, the usual advice, does not help here (−0.007, −0.020 to +0.003): three of them are the worse ones. Thresholds chosen on the test patients promise
# 0.05 of F1 too much. And nearly half of the reports find their scan among the first five of 160, perhaps because a
# drawn report names every finding, present or not.
#
# ### 4.4 Another body, another scanner
#
# First new patients on the body that no training saw, from the same scanner. Then the target: the first body on a
# scanner with another kernel, blurred across slices, more noise, an offset of some HU, more motion, and contrast agent
# in three patients of four: a bundle of changes. There the model is asked as it is, and with LoRA of rank 8 on every
# linear map and convolution of the image side, from which of the named findings the reports of 96 target patients
# affirm, as sentences in four wordings. Beside it, with five seeds each: the pooling and projection alone, and all
# weights of the image side.

# %%
there = target["target_test"]
other = ct.load_part("other_body", settings)
elsewhere = ct.zero_shot(clip, ct.embed(clip, other.volumes), settings.text, asked)
as_is = ct.zero_shot(clip, ct.embed(clip, there.volumes), settings.text, asked)
cut = len(target["target_train"].truth) * 3 // 4
floor_there = l05.baseline(*(target["target_train"].some(k) for k in (slice(cut), slice(cut, None))), there)
adapted, result = ct_target.adapt("lora", lesson.seed, l05.chosen_rate("lora"), settings,
                           target["target_train"], progress=True)
after = ct.zero_shot(adapted, ct.embed(adapted, there.volumes), settings.text, asked)
base, one = l05.areas(as_is[None], there.truth), l05.macro(after, there.truth)
body = l05.areas(elsewhere[None], other.truth)
for name, table in {"zero_shot_other_body": body, "zero_shot_target": base}.items():
    low, high = l05.spread(table)
    lesson.record(**{name: table[0, 0], f"{name}_low": low, f"{name}_high": high})
    print(f"{name}, as it is: {table[0, 0]:.3f} ({low:.3f} to {high:.3f})")
lesson.record(zero_shot_target_lora_live=one, baseline_target=l05.macro(floor_there, there.truth))
print(f"other scanner with LoRA {one:.3f}, baseline with labels {lesson.metrics['baseline_target']:.3f}")

# %%
after_all = {name: l05.areas(scores[name], l05.sweep_truth("lora")) for name in l05.TARGET}
for name, table in after_all.items():
    if name == "as_is":
        continue
    found = l05.contrast(table, after_all["as_is"])
    print(f"{name:5s} {table[:, 0].mean():.3f}, gain {found[0]:+.3f} ({found[1]:+.3f} to {found[2]:+.3f}), "
          f"{l05.committed('trainable')[name][0]:,.0f} parameters")
    if name == "lora":
        lesson.record(lora_gain=found[0], lora_gain_low=found[1], lora_gain_high=found[2])
lesson.record(zero_shot_target_lora=after_all["lora"][:, 0].mean(),
              **{f"target_{name}": after_all[name][:, 0].mean() for name in ("head", "full")})

# %% [markdown]
# On other drawn patients, another body costs 0.05, and so does another scanner. **LoRA regains nothing:** −0.002
# (−0.012 to +0.007), and neither does training the pooling alone (0.751) or everything (0.745). In 40 steps on 96
# patients none of three ways gained; why, we did not test ("everything" chose the lowest rate of its grid). An earlier
# checkpoint, with less training and without volumes that mimic other scanners, had 0.68 here and 0.81 on its own
# scanner. We changed both after seeing that number, so 0.757 is no untouched test. The baseline, with labels, has 0.56.
#
# ### 4.5 Where does a sentence look?
#
# The pooled vector is a sum over tokens. So its product with the difference of two sentences is a sum too, and can be
# shown by token: no gradient, nothing estimated. Drawn findings are outlined, so the map can be judged by the pointing
# game: how often does the strongest token lie on the finding, and how often would a random token of the body?

# %%
from medtut.models.ctclip import relevance

volume = lambda n: torch.from_numpy(np.array(test.volumes[n], np.float32))
yes, no = (s.mean(1) for s in ct.prompt_vectors(clip, settings.text))
shown = [FINDINGS.index(f) for f in ("Consolidation", "Emphysema", "Cardiomegaly")]
patients = test.truth[:, shown].argmax(0)  # the first who has it, or else patient 0
maps = [relevance(clip, volume(n), torch.from_numpy(yes[i] - no[i])).numpy() for i, n in zip(shown, patients)]
top = max(found.max() for found in maps)  # one scale for these and for section 5
fig, axes = viz.figure(1, 3, width=8.8, height=3)
for ax, i, n, found in zip(axes, shown, patients, maps):
    ill = "" if test.truth[n, i] else ", which this patient has not"
    viz_ct.show_relevance(ax, test.volumes[n], found, f"{FINDINGS[i]}{ill}", top, l05.outlines(test, n, settings)[i])
viz_ct.relevance_key(fig, axes, top)
lesson.show(fig, "where", "Three drawn patients, with consolidation, emphysema and cardiomegaly: for each the slice and the "
            "patches that speak most for the finding, from blue to yellow, and in orange its outline in that slice.");
pointing = ct.pointing(clip, test, settings)
hits, chance = np.nanmean(pointing, 0)
lesson.record(pointing_hits=hits, pointing_chance=chance)
print(f"on the finding: {hits:.2f}, a random token {chance:.2f}; lung nodules {pointing[FINDINGS.index('Lung nodule'), 0]:.2f}")

# %% [markdown]
# Orange is what was drawn, colour what the model answers to; all three share one scale.
# In 79 % the strongest token lies on the finding (the mean over findings, of 60 patients), where a random one does in 8
# %. The pooling's queries were trained on outlines, so this tests localisation on new patients; it is no evidence that
# reports teach it. The map is exact about the model; that a token has already looked at its neighbours, it does not
# show.
#
# ### 4.6 A CT that nothing was drawn on
#
# The third real chest of the course, from the 3D Slicer sample data, has 10 mm slices and its rows stored upside down.
# It was never a template and stays untouched: the same reader, the same questions. On a command line it is `medtut
# predict ct VOLUME --prompt "There is consolidation."`, with one embedding kept for all sentences.

# %%
from medtut.models.ct_predict import predict_ct

told = predict_ct(ct.real_chest(), weights=ct.weights_file(settings), text=settings.text)
for row in told["answers"][:6]:
    print(f"{row['p']:.2f}  {row['sentence']}")
print(told["note"])

# %% [markdown]
# No report comes with this patient, so nothing is scored here. A 1.00 is what the temperature makes of a cosine, not
# a calibrated probability, and slices of 10 mm are thicker than any that the model has seen.
#
# ## 5 · Ask it yourself
#
# Choose a finding and a patient. The scale of colours is that of section 4.5 for every choice, so a pale map is a weak
# one. The picture comes from a pure function, so it also stands here without a running kernel.

# %%
from medtut.widgets import explore

def render(finding, patient):
    i = FINDINGS.index(finding)
    found = relevance(clip, volume(patient), torch.from_numpy(yes[i] - no[i])).numpy()
    fig, (ax,) = viz.figure(1, 1, width=4.2, height=3.6)
    word = "has it" if test.truth[patient, i] else "does not have it"
    said = f"{finding}: P = {answers['test'][patient, i]:.2f}; the patient {word}"
    viz_ct.show_relevance(ax, test.volumes[patient], found, said, top)
    viz_ct.relevance_key(fig, [ax], top)
    return fig
ill = int(np.argmax(test.truth[:, FINDINGS.index("Pleural effusion")]))
lesson.show(render("Pleural effusion", ill), "explorer", "A drawn patient's slice with the patches that speak for "
            "the chosen finding.");
explore(render, "Patches that speak for the chosen finding.", finding=list(FINDINGS),
        patient=(0, len(test.truth) - 1))

# %% [markdown]
# ## 6 · Reality check
#
# Every claim below was written down with an expectation before the run; the verdict is computed from the numbers this
# notebook recorded. *Contradicted* means: not so in this experiment, at limits that we set. On drawn chests it says
# nothing final about anybody's results. *Not at this scale* also stands where an interval holds 0, as for SwiGLU and
# for the spread over seeds: five seeds leave it open. One claim was reworded after it was written; the head of its file
# says which. Our own expectations failed too: that LoRA gains, that RMSNorm is within 0.01, that losses differ by less
# than 0.02, that a report finds its scan three to six times as often as chance (it is fifteen).

# %%
from medtut.course.claims import judge

lesson.finish()
judge("05_ctclip_modern", lesson.metrics, lesson.profile)

# %% [markdown]
# ## Where to go on
#
# - **CT-RATE:** `python data_scripts/ct_rate.py FOLDER`, then `medtut run 05 --data FOLDER`: section 4.4 is then on
#   your volumes.
# - **The cost on your machine:** `medtut bench ctclip`; on a GPU, with `--shape published`.
# - **Your own CT:** `medtut predict ct VOLUME`. A teaching model; not for patients.
# - **Left out on purpose:** report generation, PET and MRI, detection, which the source names as its future. Two towers
#   rank sentences and write none.
#
# **Sources.** Hamamci et al., CT-CLIP and CT-RATE, arXiv:2403.17834. Liang et al., `renjie-liang/CTCLIP_MODERN`. Dao et
# al., FlashAttention, arXiv:2205.14135. Milakov and Gimelshein, arXiv:1805.02867. Zhang and Sennrich, arXiv:1910.07467.
# Shazeer, arXiv:2002.05202. Radford et al., CLIP, arXiv:2103.00020. Zhai et al., SigLIP, arXiv:2303.15343. Henry et
# al., arXiv:2010.04245. Wang et al., MedCLIP, arXiv:2210.10163. Baharoon et al., ReXGroundingCT, arXiv:2507.22030. Shui
# et al., fVLM, arXiv:2501.14548. Peeples et al., histogram layers, IEEE TAI 2022. Hu et al., LoRA, arXiv:2106.09685.
