"""Samples of images against real images, in the features of a small classifier trained on the same data.

These are the field's measures (Fréchet distance, precision and recall, entropies of the classes) in other features than
Inception's. They compare two models on one data set. They cannot be compared with a published FID or IS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadd_min.checkpoints import file as checkpoint
from cadd_min.data.images import Images, chosen
from cadd_min.utils.errors import InputError

FEATURES = 64


class Classifier(nn.Module):
    """A small convolutional network: images (N, H, W, C) uint8 -> features (N, 64) and logits (N, classes)."""

    def __init__(self, colours: int, classes: int, channels: int = 32):
        super().__init__()
        self.stages = nn.Sequential()
        for inputs, outputs in ((colours, channels), (channels, 2 * channels), (2 * channels, FEATURES)):
            self.stages.extend([nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()])
            self.stages.append(nn.MaxPool2d(2, ceil_mode=True))
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, 64) and logits (N, classes). Dropout is before the head, in training only."""
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1  # (N, C, H, W)
        features = self.stages(x).mean((2, 3))  # (N, 64)
        return features, self.head(F.dropout(features, 0.3, self.training))


def train_judge(data: Images, steps: int = 1500, seed: int = 0) -> tuple[Classifier, float]:
    """Train a classifier of the data set's labels. Returns it and its accuracy on the held-out images.

    Every call gives the same classifier. Raises InputError for data without labels.
    """
    if data.labels is None:
        raise InputError(f"{data.name} has no labels to train a judge on")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(data.train.shape[-1], data.classes())
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(data.train), (128,)).numpy()
            _, logits = net(_shifted(torch.from_numpy(data.train[rows])))
            loss = F.cross_entropy(logits, torch.from_numpy(data.labels[0][rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    net.eval()
    _, logits = judged(net, data.held_out)
    return net, float((logits.argmax(-1) == torch.from_numpy(data.labels[1])).float().mean())


def _shifted(images: Tensor, most: int = 1) -> Tensor:
    """Shift a batch by up to `most` pixels, so that the classifier learns shapes, not places."""
    down, right = torch.randint(-most, most + 1, (2,)).tolist()
    return images.roll((down, right), (1, 2))


def open_judge(data: Images, cache: Path) -> tuple[Classifier, float]:
    """Open the judge of this data set from the cache, or train it and save it there. Returns it and its accuracy.

    A damaged file in the cache is replaced. Raises InputError for data without labels.
    """
    trained_on = data.train.tobytes() + (data.labels[0].tobytes() if data.labels else b"")
    key = hashlib.sha256(trained_on).hexdigest()[:12]
    path = cache / f"judge-{data.name}-{key}.pt"
    if path.exists():
        try:
            saved = checkpoint.load(path)
            net = Classifier(data.train.shape[-1], data.classes())
            net.load_state_dict(saved["state"])
            return net.eval(), float(saved["accuracy"])
        except Exception:  # any failure means that the file is damaged
            print(f"{path} is damaged: training the judge again")
    net, accuracy = train_judge(data)
    checkpoint.save(path, {"state": net.state_dict(), "accuracy": accuracy})
    return net, accuracy


@torch.no_grad()
def judged(net: Classifier, images: np.ndarray, batch: int = 500) -> tuple[Tensor, Tensor]:
    """Compute features (N, 64) and logits (N, classes) of images (N, H, W, C) uint8, in float64."""

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the features and logits of each batch."""
        for start in range(0, len(images), batch):
            features, logits = net(torch.from_numpy(np.ascontiguousarray(images[start : start + batch])))
            yield features.double(), logits.double()

    features, logits = zip(*parts())
    return torch.cat(features), torch.cat(logits)


def measures(net: Classifier, real: Tensor, images: np.ndarray) -> dict[str, float]:
    """Measure images (N, H, W, C) against real images, given by their features (M, 64).

    Returns FD, the Fréchet distance; variety and doubt, see `class_entropies`; precision and recall.
    """
    features, logits = judged(net, images)
    variety, doubt = class_entropies(logits)
    most = min(len(real), len(features), 10_000)  # all pairs of distances are in memory at once
    some = (real[chosen(len(real), most)], features[chosen(len(features), most)])
    precision, recall = precision_recall(*some)
    distance = frechet_distance(real, features)
    return {"FD": distance, "variety": variety, "doubt": doubt, "precision": precision, "recall": recall}


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Compute the Fréchet distance of the Gaussians fitted to features (N, F) and (M, F) (Dowson & Landau 1982).

    ||mu_a - mu_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))
    """
    cov_a, cov_b = a.T.cov(), b.T.cov()  # (F, F)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()  # tr (C_a C_b)^(1/2)
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def class_entropies(logits: Tensor) -> tuple[float, float]:
    """Compute the variety and the doubt of samples from the classifier's logits (N, classes), in nats.

    Variety is the entropy of the mean over samples of p(class | image). Doubt is the mean entropy of p(class | image).
    With Inception's classes, exp(variety - doubt) is the Inception Score (Salimans et al. 2016).
    """
    p = logits.softmax(-1)
    doubt = torch.special.entr(p).sum(-1).mean()
    return float(torch.special.entr(p.mean(0)).sum()), float(doubt)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Compute precision and recall of features (M, F) and (N, F) (Kynkäänniemi et al. 2019).

    Precision is the share of samples that lie in the balls around the real images. Recall is the share of real images
    in the balls around the samples. An image's ball reaches to the k-th nearest image of its own kind.
    Raises InputError for k images of a kind or fewer.
    """
    if min(len(real), len(fake)) <= k:
        raise InputError(f"precision and recall need more than {k} images of each kind, not {len(real)}, {len(fake)}")

    def covered(points: Tensor, centres: Tensor) -> float:
        """Return the share of points within the k-th neighbour's distance of some centre."""
        radius = torch.cdist(centres, centres).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
        return float((torch.cdist(points, centres) <= radius).any(1).double().mean())

    return covered(fake, real), covered(real, fake)
