"""Small random data with the facts of any task: what stands in for files that are not here."""
import torch

from s4nb.data.base import DataModule
from s4nb.data.next_step import NextSteps, pad_pairs


class Examples(torch.utils.data.Dataset):
    "n random examples (x, y) with these facts; sequences of tokens have different lengths."

    def __init__(self, n, seed, kind, n_tokens, d_input, d_output, l_max, l_output, pairs):
        g = torch.Generator().manual_seed(seed)
        draw = lambda high, *shape: torch.randint(high, shape, generator=g)
        self.lengths = draw(l_max // 2, n) + l_max // 2 + 1 if n_tokens and not l_output else torch.full((n,), l_max)
        one = lambda l: draw(n_tokens, l) if n_tokens else torch.randn(l, d_input, generator=g)
        self.x = [(one(l), one(l)) if pairs else one(l) for l in self.lengths.tolist()]
        size = (n, l_output) if l_output else (n,)
        self.labels = draw(d_output, *size) if kind == "classification" else torch.randn(*size, d_output, generator=g)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.labels[i]


class StandIn(DataModule):
    "Random examples, `sizes` of them in train, val and test; of pairs, both documents of a batch lie one after the other."
    name = "stand-in"

    def __init__(self, kind, n_tokens, d_input, d_output, l_max, l_output, pairs, sizes=(8, 4, 4)):
        self.kind, self.n_tokens, self.d_input, self.d_output = kind, n_tokens, d_input, d_output
        self.l_max, self.l_output, self.pairs, self.sizes = l_max, l_output, pairs, sizes

    def load(self, split):
        i = ("train", "val", "test").index(split)
        data = Examples(self.sizes[i], i, self.kind, self.n_tokens, self.d_input, self.d_output, self.l_max, self.l_output, self.pairs)
        return NextSteps(data, lambda x: x) if self.l_output == self.l_max and self.n_tokens else data

    def collate(self, items, rate):
        if self.l_output == self.l_max and self.n_tokens:
            return pad_pairs(items)
        if not self.pairs:
            return super().collate(items, rate)
        first, second = zip(*(x for x, _ in items))
        batch = super().collate([(x, 0) for x in first + second], rate)
        return batch._replace(y=torch.stack([y for _, y in items]))
