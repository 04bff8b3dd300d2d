"""Images as sequences of rows, for what is tested on sequences."""
import torch


class Rows(torch.nn.Module):
    "A layer on images (b l w d) as one on sequences of rows (b l w*d)."
    def __init__(self, layer, w=4):
        super().__init__()
        self.layer, self.w, self.d_model, self.d_output = layer, w, w * layer.d_model, w * layer.d_output

    def forward(self, u, state=None, lengths=None, return_state=True):
        if lengths is not None: lengths = torch.stack([lengths, torch.full_like(lengths, self.w)], 1)
        y, state = self.layer(u.unflatten(-1, (self.w, -1)), state, lengths, return_state=return_state)
        return y.flatten(2), state

    def step(self, u, state): return self.layer.step(u, state)
    def default_state(self, *batch, device=None): return self.layer.default_state(*batch, device=device)
