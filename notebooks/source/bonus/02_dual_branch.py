# %% [markdown]
# # Bonus 02 · Two branches
#
# <!-- medtut:colab --><!-- /medtut:colab -->
#
# **Question.** The project of lesson 02 calls itself a first step toward a *dual-branch*
# architecture: "global/local branches with cross-attention fusion" is its future work. Its
# tower sees the whole slice through 4 × 4 patches. Does a second branch that sees every
# pixel help, and what would we need to know before saying so?
#
# **You will be able to** put a light convolutional branch beside an adapted tower so that
# the model starts as it was; say before the run how much there is to gain; keep the books
# of both; and read a comparison of one run each for what it is.
#
# **You need** lesson 02. No GPU.
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
tower = None
steps = None
batch_size = None
rank = None
alpha = None
dropout = None
train_patients = None
validation_patients = None
test_patients = None
level_step = None
oracle_slices = None
rate = None
width = None

# %%
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from medtut import viz
from medtut.course import open_lesson
from medtut.course.lessons import l02, medclip
from medtut.data.brats import load_case
from medtut.evaluate import interval, oracle_grid, region_dice
from medtut.lora import ledger
from medtut.train import TrainConfig, fit

lesson = open_lesson(
    "bonus/02_dual_branch", profile=profile, seed=seed, data=data, out=out, tower=tower,
    steps=steps, batch_size=batch_size, rank=rank, alpha=alpha, dropout=dropout,
    train_patients=train_patients, validation_patients=validation_patients,
    test_patients=test_patients, level_step=level_step, oracle_slices=oracle_slices,
    rate=rate, width=width,
)
lesson

# %% [markdown]
# ## 1 · What is there to gain?
#
# Lesson 02 replaced the 16 × 16 output grid by one of 56 × 56. One cell of it still covers
# 4 × 4 pixels of the network's picture. As in section 2.1 of the lesson we ask what the best
# grid of that size could score, by fitting it to the truth: the level with the largest
# tumour of every test patient, in which a rim of enhancing tumour is a few voxels thin.

# %%
task = medclip.load_task(lesson.settings)
labels = [load_case(case).label for case in task.part("test")]
levels = [int((label > 0).sum((0, 1)).argmax()) for label in labels]
truth = torch.stack([torch.from_numpy(label[:, :, z]).long()
                     for label, z in zip(labels, levels)])
ceiling = np.mean([region_dice(p, t)["foreground"]
                   for p, t in zip(oracle_grid(truth, 56), truth)])
swept = l02.committed()["lora"]
lesson.record(oracle_56=ceiling, sweep_lora=swept.mean())
print(f"best possible grid of 56 x 56   {ceiling:.3f}")
print(f"LoRA in the lesson's sweep      {swept.mean():.3f} over {len(swept)} seeds")

# %% [markdown]
# The two numbers are not the same measure (single levels here, whole volumes there), but
# the distance between them is far larger than that difference. What keeps the lesson's
# model from the truth is mostly *not* the grid. So we write down an expectation before we
# train: sharper edges alone cannot win much, at most what lies between the ceiling and one.
# A branch at full resolution may still help in another way, because it looks at intensities
# that the patch embedding has already mixed. Whether it does is a question for a run.
#
# ## 2 · A branch that keeps every pixel
#
# The *local* branch is two 3 × 3 convolutions at 224 × 224. It never shrinks the picture, so
# it is precise about where an edge is, and it sees only a few pixels around each place, so
# it cannot know what the edge belongs to. The *global* branch is the lesson's tower with
# LoRA and its pyramid. The two meet before the logits: the pyramid's 64 channels are squeezed,
# stretched to full size, laid beside the local ones, and blended by one more convolution.
#
# Networks of this kind are older than this project: BiSeNet (Yu et al., 2018) calls the two
# a spatial and a context path, TransFuse (Zhang et al., 2021) runs a convolutional network
# beside a transformer. The source names cross-attention as its fusion. We lay the maps
# side by side instead: every pixel knows which cell of the coarse map it lies in, so there
# is nothing to search for, and it costs a fraction.

# %% tags=["export"]
def block(channels, width):
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False),
                         nn.GroupNorm(4, width), nn.ReLU())

class TwoBranches(nn.Module):
    """The lesson's model beside a branch at full size; it starts as that model."""

    def __init__(self, model, channels=1, width=16, classes=4):
        super().__init__()
        self.encoder, self.seg_head = model.encoder, model.seg_head
        self.final, self.seg_head.final = self.seg_head.final, nn.Identity()
        self.squeeze = nn.Conv2d(self.final.in_channels, width, 1)
        self.local = nn.Sequential(block(channels, width), block(width, width))
        self.fuse = block(2 * width, width)
        self.out = nn.Conv2d(width, classes, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):  # (batch, channels, 224, 224) -> (batch, classes, 224, 224)
        y = self.seg_head(self.encoder.stages(x))  # (batch, 64, 56, 56)
        logits, context = (F.interpolate(z, size=x.shape[-2:], mode="bilinear")
                           for z in (self.final(y), self.squeeze(y)))
        return logits + self.out(self.fuse(torch.cat([self.local(x), context], 1)))

# %% [markdown]
# The last layer of the branch starts at zero, for the reason for which LoRA's $B$ does: at
# step 0 the model gives exactly the logits of the lesson's model, and whatever differs
# afterwards was learned. (ControlNet, Zhang et al., 2023, calls it a zero convolution.) As
# with $B$, one factor at zero is enough; if the layer before it were zero as well, neither
# would ever have a gradient. We check the start, and that the branch moves after one step.

# %%
arm = medclip.DESIGNS["lora"]
def build(name):
    torch.manual_seed(lesson.seed)
    model = medclip.build(arm, lesson.settings)
    return TwoBranches(model, len(arm.modalities), lesson.width) if name == "dual" else model

plain, dual = build("lora").eval(), build("dual").eval()
picture = torch.randn(1, len(arm.modalities), 224, 224)
with torch.no_grad():
    start = (plain(picture) - dual(picture)).abs().max().item()
for _ in range(2):
    dual.zero_grad()
    F.cross_entropy(dual(picture), torch.zeros(1, 224, 224, dtype=torch.long)).backward()
    last, first = (p.weight.grad.abs().max().item() for p in (dual.out, dual.local[0][0]))
    print(f"largest gradient: last layer {last:.1e}, first layer {first:.1e}")
    with torch.no_grad():
        dual.out.weight -= 0.1 * dual.out.weight.grad
lesson.record(start_difference=start, first_layer_moves=first > 0)
print("difference of the logits before training:", start)

# %% [markdown]
# Before the first step only the last layer has a gradient; from the second on all have.
# Now the books. The ledger files the branch under "head" so that it stands in a row of its
# own beside the adapters and the decoder.

# %%
own = {"head": "^(squeeze|local|fuse|out)", "decoder": "^(seg_head|final)"}
books = {name: ledger(build(name), **own) for name in ("lora", "dual")}
added = books["dual"].rows["head"].parameters
lesson.record(branch_parameters=added,
              **{f"trainable_{name}": book.trainable for name, book in books.items()})
print(f"the branch adds {added:,} parameters, {added / books['lora'].trainable:.1%} "
      "of what LoRA and the pyramid train")
books["dual"]

# %% [markdown]
# Few parameters, and still not cheap: a convolution at 224 × 224 is evaluated at 50,176
# places and keeps its maps for the backward pass. Parameters are a poor measure of cost; the
# seconds of both trainings are printed below.
#
# ## 3 · One run each
#
# Same patients, slices, order of the batches, steps, loss, seed and learning rate; the rate
# is the one that validation chose for *LoRA* in the lesson's sweep. The branch gets no tuning
# of its own, which may cost it something. As in the lesson, validation patients choose the
# step whose weights are kept, and test patients are labelled as volumes.

# %%
chosen = lesson.rate or l02.chosen_rate("lora")
slices, seen, _ = medclip.dealt(task, arm, lesson.settings, lesson.seed)
config = TrainConfig(
    steps=lesson.steps, batch_size=lesson.batch_size, lr=chosen, weight_decay=0.01,
    warmup=lesson.steps // 20, eval_every=max(1, lesson.steps // 4), seed=lesson.seed)

def judged(model, part, step):
    return medclip.foreground([medclip.predict(model, c, arm, step) for c in task.part(part)])

def validate(model):
    return {"score": float(np.nanmean(judged(model, "validation", 3 * lesson.level_step)))}

scores = {}
for name in ("lora", "dual"):
    model = build(name)
    result = fit(model, medclip.loss_of(arm), torch.utils.data.Subset(slices, seen), config,
                 validate=validate, out=lesson.out / name)
    scores[name] = judged(model, "test", lesson.level_step)
    lesson.record(**{f"score_{name}": scores[name].mean(), f"seconds_{name}": result.seconds,
                     f"best_step_{name}": result.best["step"]})
    print(f"{name:5s} foreground Dice {scores[name].mean():.3f}   {result.seconds:.0f} s")

# %%
fig, (left, right) = viz.figure(1, 2, width=8.5, height=3.6)
viz.compare_arms(left, {"LoRA": scores["lora"], "LoRA +\nlocal branch": scores["dual"]},
                 ylabel="foreground Dice per patient", one_run=True)
right.plot([0, 1], [0, 1], color=viz.GREY, ls="--", lw=1, marker="")
right.plot(scores["lora"], scores["dual"], "o", color=viz.BLUE)
low, high = (f(np.concatenate(list(scores.values()))) for f in (np.min, np.max))
right.set(xlim=(low - 0.05, high + 0.05), ylim=(low - 0.05, high + 0.05),
          xlabel="LoRA", ylabel="LoRA + local branch", aspect="equal")
right.set_title("a point is a patient; one run, not evidence", fontsize=9,
                color=viz.VERMILION)
lesson.show(fig, "branches", "Left: foreground Dice of LoRA and of LoRA with the local "
            "branch, one run each with intervals over patients. Right: the same scores patient "
            "by patient, with a dashed line where both are equal.");

# %% [markdown]
# Points above the dashed line are patients for whom the model with the branch did better.
# That they lean to one side says something about these two *trained models*, and nothing yet
# about the two *designs*: another seed draws other batches and another start, and moves all
# the points of a model together. How far? The sweep of lesson 02 has trained this very LoRA
# design with several seeds and nothing else changed. That range is the yardstick. (It is for
# the drawn patients at the settings of the profile `quick`; for your own, sweep first.)

# %%
gain = scores["dual"] - scores["lora"]
low, high = interval(gain)
means = swept.mean(1)
spread = float(np.ptp(means))
inside = bool(abs(gain.mean()) <= spread)
lesson.record(dual_minus_lora=gain.mean(), dual_minus_lora_low=low,
              dual_minus_lora_high=high, patients_better=int((gain > 0).sum()),
              seed_range=spread, within_seed_range=inside)
print(f"with the branch minus without: {gain.mean():+.3f} "
      f"(over patients {low:+.3f} to {high:+.3f}; seeds are not in it)")
print(f"better for {(gain > 0).sum()} of {len(gain)} patients")
print(f"LoRA alone, {len(means)} seeds: {means.min():.3f} to {means.max():.3f}, "
      f"a range of {spread:.3f}")
print("the difference is", "within" if inside else "beyond", "what a seed alone can do")

# %%
lesson.finish()

# %% [markdown]
# ## 4 · What one run can tell, and what it cannot
#
# **It can tell** that the branch trains, that it starts where the lesson's model starts, what
# it costs in parameters and seconds, and that nothing broke. It can also refute strong claims:
# had a full-resolution branch been what was missing, one run would have shown a gain on
# the scale of the gap in section 1.
#
# **It cannot tell** which design is better. If the last line above says *within*, the
# difference, whatever its sign, is of the size that LoRA shows against itself when only the
# seed changes, and the interval over patients does not help, because it knows nothing of
# seeds: it can exclude zero for two runs of the *same* design. If it says *beyond*, there is
# reason to spend five seeds on the question, with a rate tuned for each arm, and no more
# than that: one draw from the branch's own range is still one draw.
#
# **And if five seeds agreed?** A difference between the arms would still have more than one
# explanation: full resolution, a second look at the intensities, or simply more layers. The
# control would be the same branch fed with a picture that was first shrunk to 56 × 56 and
# stretched again: as many parameters, no detail.
#
# **To take away.** Measure the room before building into it. Start an addition at zero so
# that what differs was learned. Report one run as one run.
#
# **Left out on purpose:** cross-attention as the fusion, which the source intends but has
# not published; 3-D branches; tuning the branch until it wins.
#
# **Sources.** Yu et al., *BiSeNet*, arXiv:1808.00897. Zhang, Liu and Hu, *TransFuse*,
# arXiv:2102.08005. Zhang, Rao and Agrawala, *ControlNet*, arXiv:2302.05543. Lin et al.,
# *Feature Pyramid Networks*, arXiv:1612.03144. Pendhari, Kok and Jiao, *MedCLIP Fine-Tuning
# via LoRA for Brain Tumor Segmentation*, 2025 (the project of lesson 02).
