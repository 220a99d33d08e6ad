"""Small stand-ins that are built and named like the libraries' modules."""

from torch import nn


class Block(nn.Module):
    """Any module with the children given by name; never called."""

    def __init__(self, children=None, **more):
        super().__init__()
        for name, child in {**(children or {}), **more}.items():
            setattr(self, name, child)


def lin(a=8, b=8):
    return nn.Linear(a, b)


def swin_v4():
    """transformers 4 Swin: attention.self.{query,key,value}, output.dense twice."""
    return Block(
        attention=Block(
            {
                "self": Block(query=lin(), key=lin(), value=lin()),
                "output": Block(dense=lin()),
            }
        ),
        intermediate=Block(dense=lin(8, 32)),
        output=Block(dense=lin(32, 8)),
    )


class SABlock(nn.Module):
    """MONAI's self-attention block."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out_proj = lin(8, 24), lin()


class MLPBlock(nn.Module):
    """MONAI's MLP."""

    def __init__(self):
        super().__init__()
        self.linear1, self.linear2 = lin(8, 32), lin(32, 8)


class FeedForward(nn.Module):
    """A perceptron whose layers have only numbers, as in the CT-ViT code."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(8), lin(8, 32), nn.GELU(), lin(32, 8))


class TimmAttention(nn.Module):
    """timm's attention, runnable."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = (
            self.qkv(x)
            .view(n, length, 3, self.num_heads, -1)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, length, width))


class TimmBlock(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.attn = TimmAttention(width)
        self.mlp = Block(fc1=nn.Linear(width, 16), fc2=nn.Linear(16, width))

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp.fc2(self.mlp.fc1(x).relu())


class TimmViT(nn.Module):
    """Two blocks and a head; the smallest runnable model with a fused qkv."""

    def __init__(self, width=8):
        super().__init__()
        self.patch_embed = Block(proj=nn.Conv2d(3, width, 4, 4))
        self.blocks = nn.Sequential(TimmBlock(width), TimmBlock(width))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(x).mean(1))
