"""Measure generated images by their features (`features.py`): how far they are from photographs, and what they show.

Features are float32 [N, D], one row per image; functions compute in float64.
"""
import torch
import torch.nn.functional as F

RIDGE = 1.0          # weight of the penalty of a linear map, relative to the mean variance of a feature
CANDIDATES = 100     # captions among which R-precision looks for the right one
BLOCK = 1024         # images that are compared with all others at once
SPLITS = 10          # parts whose Inception scores are averaged


def frechet_distance(features, others):
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), with means m and covariances S of features [N, D] and [M, D].

    Heusel et al., NIPS 2017; with Inception's features it is the FID. S = A^T A, where A are the centered features
    divided by sqrt(N - 1). So tr (S1 S2)^(1/2) is the sum of the singular values of A1 A2^T. No root of a D x D matrix
    is needed: it is ill-conditioned with fewer images than features.
    """
    features, others = features.double(), others.double()
    centered, others_centered = ((values - values.mean(0)) / (len(values) - 1) ** .5 for values in (features, others))
    shared = torch.linalg.svdvals(centered @ others_centered.T).sum()
    return float((features.mean(0) - others.mean(0)).square().sum()
                 + centered.square().sum() + others_centered.square().sum() - 2 * shared)


def kernel_distance(features, others):
    """Return the unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3; negative by chance near 0.

    Binkowski et al., ICLR 2018; with Inception's features it is the KID. The paper averages it over random subsets,
    this takes all images at once, which has the same expectation.
    """
    def kernel_sum(a, b):  # in blocks: 30,000 images have 900 million pairs
        return sum(((part @ b.T / a.shape[1] + 1) ** 3).sum() for part in a.split(BLOCK))

    def within(a):  # the mean over pairs of different images
        own = (a.square().sum(1) / a.shape[1] + 1) ** 3
        return (kernel_sum(a, a) - own.sum()) / (len(a) * (len(a) - 1))

    features, others = features.double(), others.double()
    between = kernel_sum(features, others) / (len(features) * len(others))
    return float(within(features) + within(others) - 2 * between)


def inception_score(logits):
    """Return exp(E KL(p(y|x) || p(y))), with Inception's class probabilities p(y|x) from logits [N, 1008].

    Salimans et al., NIPS 2016. It is the mean over ten parts of the images, in a random order.
    """
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    scores = []
    for part in logits[order].double().chunk(SPLITS):
        p, log_p = part.softmax(1), part.log_softmax(1)
        scores.append((p * (log_p - p.mean(0, keepdim=True).log())).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def fit_linear(features, targets):
    """Return a function that maps features [N, D] to [N, K], fitted to `targets` [M, K] by ridge regression."""
    features, targets = features.double(), targets.double()
    center, target_center = features.mean(0), targets.mean(0)
    centered = features - center
    gram = centered.T @ centered
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram + penalty, centered.T @ (targets - target_center))
    return lambda rows: (rows.double() - center) @ weights + target_center


def fit_species(features, labels):
    """Return a linear classifier: a function from features [N, D] to labels long [N]."""
    score = fit_linear(features, F.one_hot(labels))
    return lambda rows: score(rows).argmax(1)


def species_of_halves(features, labels):
    """Return the share of photographs that a classifier fitted to the other half of them recognizes."""
    one = half_of(labels)
    hits = [fit_species(features[~half], labels[~half])(features[half]) == labels[half] for half in (one, ~one)]
    return float(torch.cat(hits).double().mean())


def half_of(labels):
    """Return a mask, bool [N], of every second photograph of each species."""
    order = torch.argsort(labels, stable=True)
    return torch.zeros(len(labels), dtype=torch.bool).index_fill_(0, order[::2], True)


def r_precision(read, embeddings, labels):
    """Return how often an image matches its own caption best, of 100, the others being of other species.

    `read` holds the embeddings [N, K] that were read off N images, `embeddings` [N, K] those of their captions, and
    `labels` [N] their species. The match is the cosine of the centered embeddings (R-precision, Xu et al., CVPR 2018,
    section 4.1, where mismatched captions are random).
    """
    read, embeddings = F.normalize(read.double()), F.normalize(embeddings.double())
    generator = torch.Generator().manual_seed(0)
    hits = []
    for i, own in enumerate(embeddings):
        others = (labels != labels[i]).nonzero()[:, 0]
        drawn = others[torch.randint(len(others), (CANDIDATES - 1,), generator=generator)]
        hits.append(bool(own @ read[i] > (embeddings[drawn] @ read[i]).max()))
    return sum(hits) / len(hits)


def mean_distance_within(features, groups):
    """Return the mean distance between two images of the same group; `groups` [N] holds the groups' numbers."""
    means = [torch.pdist(features[groups == group].double()).mean() for group in groups.unique()
             if (groups == group).sum() > 1]
    return float(torch.stack(means).mean())


def nearest(features, others):
    """Return (distance to the nearest of the `others`, its number) for each image: float64 [N], long [N]."""
    others = others.double()
    found = [torch.cdist(part.double(), others).min(1) for part in features.split(BLOCK)]
    return tuple(map(torch.cat, zip(*found)))
