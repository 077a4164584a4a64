"""
What generation needs: the key-value cache, prompts of different lengths in one batch, drawing a token.
"""

import torch


class LayerCache:
    """Keys and values of one layer, (B, n_kv_head, size, head_dim), filled from the left. It grows when full."""

    def __init__(self, size):
        self.size, self.length, self.k, self.v = size, 0, None, None

    def append(self, k, v):
        """Adds (B, heads, T, head_dim) and returns all keys and values so far."""
        start, end = self.length, self.length + k.size(2)
        if self.k is None or end > self.size:
            self.size = max(self.size, end if self.k is None else 2 * end)
            self.k, self.v = self.room(k, self.k), self.room(v, self.v)
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def room(self, new, old):
        """A tensor for size keys or values like new, which begins with the old ones."""
        B, heads, _, head_dim = new.shape
        whole = new.new_empty(B, heads, self.size, head_dim)
        if old is not None:
            whole[:, :, :self.length] = old[:, :, :self.length]
        return whole


class Cache:
    """One LayerCache a layer, and the position of every cached key (B, S), negative for padding."""

    def __init__(self, n_layer, size):
        """size: for how many positions there is room at first."""
        self.layers = [LayerCache(size) for _ in range(n_layer)]
        self.pos = None
        self.seen = 0                                             # tokens so far
        self.next = None                                          # position (B, 1) of the next token

    def add(self, pos):
        """Adds the positions (B, T) of new tokens."""
        self.pos = pos if self.pos is None else torch.cat((self.pos, pos), 1)

    def mask(self, pos, window):
        """Which keys the tokens at positions (B, T) see, bool (B, 1, T, S). window: 0 for none."""
        key, query = self.pos[:, None, None, :], pos[:, None, :, None]
        seen = (key <= query) & (key >= 0)
        if window:
            seen &= query - key < window
        # Padding sees padding, because a query that sees nothing would be NaN.
        return seen | (key == query)

    def select(self, rows):
        """Reorders the batch: row i becomes what row rows[i] was (beam search, finished rows)."""
        self.pos, self.next = self.pos[rows], self.next[rows]
        for layer in self.layers:
            layer.k, layer.v = layer.k[rows], layer.v[rows]


# -----------------------------------------------------------------------------
# prompts and tokens


def pad_left(prompts, device):
    """
    Lists of token ids -> tokens and positions, (B, T) int64 both; padding stands at the left and has
    negative positions.
    """
    longest = max(map(len, prompts))
    if min(map(len, prompts)) < 1:
        raise ValueError("an empty prompt: give at least the beginning-of-sequence token")
    padding = [longest - len(p) for p in prompts]
    tokens = torch.tensor([[0] * n + list(p) for n, p in zip(padding, prompts)], device=device)
    return tokens, torch.arange(longest, device=device) - torch.tensor(padding, device=device)[:, None]


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draws a token from each row of logits (B, V): (B,) int64. temperature 0 takes the largest."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p           # The token that crosses p stays.
        logits = logits.masked_fill(beyond.scatter(1, index, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
