"""
The key-value cache that generation fills.
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
