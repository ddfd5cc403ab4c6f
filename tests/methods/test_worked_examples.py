"""The papers' formulas worked by hand: each test does the arithmetic in its docstring, and the method must agree.

Every example can be followed with a pencil. Symbols are the papers'; a task vector is τ or δ, the base θ₀.
"""

from __future__ import annotations

import math

import pytest
import torch
from float64_reference import merge

import dapt_merge as dm
from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_ties_as_published():
    """TIES (arXiv:2306.01708, section 3 and algorithm 1), k = 40%, λ = 2, three task vectors of ten parameters.

    The parameters are those of a model of two tensors, a (four) and b (six), and the paper trims over all of them.
    1. Trim: keep the 4 = 40% of 10 largest magnitudes of each task vector.
                    a                |  b
        τ₁ = [ 5, −1,  0,  2         |  1, −6,  3,  0,  1,  0]  → [ 5, 0, 0, 2 |  0, −6,  3, 0, 0, 0]
        τ₂ = [−3,  4,  1,  0         |  0,  2, −5,  1,  0,  0]  → [−3, 4, 0, 0 |  0,  2, −5, 0, 0, 0]
        τ₃ = [ 1,  6,  0,  1         |  7, −2,  0,  0,  1, −3]  → [ 0, 6, 0, 0 |  7, −2,  0, 0, 0, −3]
    2. Elect: the sign with the larger total magnitude, which is the sign of the sum.
        sums  [ 2, 10, 0, 2 | 7, −6, −2, 0, 0, −3]  → γ = [+, +, ·, + | +, −, −, ·, ·, −]
    3. Disjoint merge: the mean of those entries, not 0, whose sign is γ.
        a: 5; (4 + 6)/2 = 5; 0; 2       b: 7; (−6 − 2)/2 = −4; −5; 0; 0; −3
    4. θ = θ₀ + λτ, with θ₀ = 1 everywhere.
    """
    tau = [
        ([5.0, -1, 0, 2], [1.0, -6, 3, 0, 1, 0]),
        ([-3.0, 4, 1, 0], [0.0, 2, -5, 1, 0, 0]),
        ([1.0, 6, 0, 1], [7.0, -2, 0, 0, 1, -3]),
    ]
    base = {"a": torch.ones(4), "b": torch.ones(6)}
    models = [{"a": 1 + torch.tensor(a), "b": 1 + torch.tensor(b)} for a, b in tau]
    paper = {"weight": 1, "density": 0.4, "lambda": 2, "elect": "unweighted", "trim_scope": "model"}
    merged = dm.merge(base, models, "ties", **paper)
    assert merged["a"].tolist() == [1 + 2 * 5, 1 + 2 * 5, 1, 1 + 2 * 2]
    assert merged["b"].tolist() == [1 + 2 * 7, 1 - 2 * 4, 1 - 2 * 5, 1, 1, 1 - 2 * 3]


def test_ties_as_mergekit_has_it():
    """The same task vectors, but trimmed in each tensor, and weighted: a alone, k = 50%, weights 1, 2, 1.

    trimmed:   [5, 0, 0, 2], [−3, 4, 0, 0], [1, 6, 0, 0]   (the third: 1, 0, 1 tie for one place; the first has it)
    weighted:  [5, 0, 0, 2], [−6, 8, 0, 0], [1, 6, 0, 0]   sums [0, 14, 0, 2], and a sum of 0 elects +
    agreeing:  (5 + 1)/(1 + 1) = 3;  (8 + 6)/(2 + 1) = 14/3;  0;  2/1 = 2
    """
    models = [tensor(5, -1, 0, 2), tensor(-3, 4, 1, 0), tensor(1, 6, 0, 1)]
    merged = merge("ties", torch.zeros(4), models, weight=[1, 2, 1], density=0.5)
    assert merged.tolist() == pytest.approx([3, 14 / 3, 0, 2])


def test_dare_as_published():
    """DARE (arXiv:2311.03099, section 3): drop rate p = 0.75; kept entries are multiplied with 1/(1 − p) = 4.

        δ̃ = m∘δ,  δ̂ = δ̃/(1 − p),  θ = θ₀ + λδ̂  with λ = 0.5:  δ = 3 becomes 0 or 0.5 · 3 · 4 = 6.
    The expectation is λδ: of 40 000 entries the mean is 1.5, to four standard errors of 6·√(p(1 − p)/40 000) = 0.013.
    """
    moved = merge("dare_linear", torch.ones(40_000), [torch.full((40_000,), 4.0)], weight=1, density=0.25, lambda_=0.5)
    assert set((moved - 1).tolist()) == {0.0, 6.0}
    assert float((moved - 1).double().mean()) == pytest.approx(1.5, abs=4 * 6 * math.sqrt(0.75 * 0.25 / 40_000))


def test_dare_before_ties_as_published():
    """DARE as a plug-in for TIES: two task vectors that always disagree, δ₁ = 2 and δ₂ = −1, p = 0.5, factor 2.

    both kept:  4 against −2, sum 2 ≥ 0: the first is merged alone, 4
    one kept:   4 or −2;  none: 0.   Each of the four happens to a quarter of the elements.
    """
    base = torch.zeros(40_000)
    merged = merge("dare_ties", base, [base + 2, base - 1], weight=1, density=0.5)
    shares = {value: float((merged == value).double().mean()) for value in (4.0, -2.0, 0.0)}
    error = 4 * math.sqrt(0.25 / 40_000)
    assert shares == {4.0: pytest.approx(0.5, abs=error), -2.0: pytest.approx(0.25, abs=error),
                      0.0: pytest.approx(0.25, abs=error)}  # fmt: skip


def test_model_stock_as_published_for_two_models():
    """Model Stock (arXiv:2403.19522, section 4): w_H = t·w₁₂ + (1 − t)·w₀ with t = 2 cos θ/(1 + cos θ).

    w₀ = (1, 1, 1);  w₁ − w₀ = (2, 1, 2), w₂ − w₀ = (2, 2, 1): both of length 3
    cos θ = (4 + 2 + 2)/9 = 8/9;   t = (16/9)/(17/9) = 16/17
    w₁₂ − w₀ = (2, 1.5, 1.5);   w_H = 1 + 16/17 · (2, 1.5, 1.5)
    """
    base = torch.ones(3)
    merged = merge("model_stock", base, [base + tensor(2, 1, 2), base + tensor(2, 2, 1)])
    assert merged.tolist() == pytest.approx([1 + 32 / 17, 1 + 24 / 17, 1 + 24 / 17])


def test_model_stock_as_published_for_n_models():
    """t = N cos θ/(1 + (N − 1) cos θ): four models that share one direction and have one of their own each.

    δᵢ = (1, eᵢ) of length √2, cos θ = 1/2 between any two;   t = (4 · ½)/(1 + 3 · ½) = 0.8
    mean δ = (1, ¼, ¼, ¼, ¼);   merged = (0.8, 0.2, 0.2, 0.2, 0.2)
    """
    models = [torch.cat([tensor(1), torch.eye(4)[position]]) for position in range(4)]
    merged = merge("model_stock", torch.zeros(5), models)
    assert merged.tolist() == pytest.approx([0.8, 0.2, 0.2, 0.2, 0.2])


def test_wise_ft_task_arithmetic_and_model_soups_as_published():
    """WiSE-FT (2109.01903): (1 − α)θ₀ + αθ₁; task arithmetic (2212.04089): θ₀ + λΣτ; soups (2203.05482): (θ₁ + θ₂)/2.

    θ₀ = (1, 2), θ₁ = (3, 2), θ₂ = (1, 6):  τ₁ = (2, 0), τ₂ = (0, 4)
        α = ¼: (1.5, 2);   λ = ½: (2, 4);   forgetting, λ = −1 of τ₁: (−1, 2);   soup: (2, 4)
    """
    base, one, two = tensor(1, 2), tensor(3, 2), tensor(1, 6)
    assert merge("linear", base, [one], weight=0.25).tolist() == [1.5, 2]
    assert merge("task_arithmetic", base, [one, two], weight=1, lambda_=0.5).tolist() == [2, 4]
    assert merge("task_arithmetic", base, [one], weight=-1).tolist() == [-1, 2]
    assert merge("linear", None, [one, two], weight=1).tolist() == [2, 4]


@pytest.mark.parametrize("degrees", [30, 60, 90, 120])
def test_slerp_divides_the_angle(degrees):
    """Unit vectors at 0° and at Ω: a third of the way is the unit vector at Ω/3; lengths 1 and 2 keep the factors.

    (sin(2Ω/3)·θ₀ + sin(Ω/3)·θ₁)/sin Ω
    """
    angle = math.radians(degrees)
    base, model = tensor(1, 0), tensor(math.cos(angle), math.sin(angle))
    third = [math.cos(angle / 3), math.sin(angle / 3)]
    assert merge("slerp", base, [model], t=1 / 3).tolist() == pytest.approx(third, abs=1e-6)
    assert merge("nuslerp", None, [base, model], weight=[2, 1]).tolist() == pytest.approx(third, abs=1e-6)
    first, second = (math.sin(part * angle / 3) / math.sin(angle) for part in (2, 1))
    longer = [first + 2 * second * math.cos(angle), 2 * second * math.sin(angle)]
    assert merge("slerp", base, [2 * model], t=1 / 3).tolist() == pytest.approx(longer, abs=1e-6)


def test_karcher_and_multislerp_of_unit_vectors_at_0_60_and_90_degrees():
    """On a circle the Karcher mean is the mean angle, 50°. One tangent step from the mean direction stays there:

    the sum of the unit vectors is (1 + ½ + 0, √3/2 + 1) = (1.5, 1.866), at atan(1.866/1.5) = 51.206°
    """
    vectors = [tensor(math.cos(math.radians(angle)), math.sin(math.radians(angle))) for angle in (0, 60, 90)]
    mean = merge("karcher", None, vectors, max_iter=50, tol=1e-9)
    assert math.degrees(math.atan2(mean[1], mean[0])) == pytest.approx(50, abs=1e-4)
    step = merge("multislerp", None, vectors, weight=1)
    assert math.degrees(math.atan2(step[1], step[0])) == pytest.approx(51.206, abs=1e-3)
    assert float(mean.norm()) == pytest.approx(1)
    assert float(step.norm()) == pytest.approx(1)


def test_breadcrumbs_as_published():
    """Model Breadcrumbs (arXiv:2312.06795): of ten magnitudes the top 10% and the bottom 40% go, α = 0.5.

    |δ|  1 2 3 4 | 5 6 7 8 9 | 10   → kept 5 … 9;   merged = α·Σ masked task vectors
    """
    delta = tensor(10, 1, -9, 2, 8, -3, 7, 4, -6, 5)
    merged = merge("breadcrumbs", torch.zeros(10), [delta, delta], weight=0.5, density=0.5, gamma=0.1)
    assert merged.tolist() == [0, 0, -9, 0, 8, 0, 7, 0, -6, 5]


def test_della_as_published():
    """DELLA's MAGPRUNE (arXiv:2406.11617): keep probabilities grow with the rank in the row, and 1/p makes up for it.

    Four elements, density 0.5, epsilon 0.3: ranks 0, 1, 2, 3 of 3 give 0.2, 0.4, 0.6, 0.8. A kept δ becomes δ/p: the
    row 1, 2, 3, 4 becomes 5, 5, 5, 5 where it is kept; 20 000 rows keep these shares, to four standard errors.
    """
    delta = tensor(3, 1, -4, 2).repeat(20_000, 1)
    merged = merge("della_linear", torch.zeros_like(delta), [delta], weight=1, density=0.5, epsilon=0.3)
    assert torch.allclose(merged[merged != 0].abs(), tensor(5.0))
    shares = (merged != 0).double().mean(dim=0).tolist()
    assert shares == pytest.approx([0.6, 0.2, 0.8, 0.4], abs=4 * math.sqrt(0.25 / 20_000))


def test_sce_as_published():
    """SCE (arXiv:2408.07990): two task vectors of four parameters, the half of largest variance.

    δ₁ = (4, 1, 2, 1), δ₂ = (−2, 1, 4, 2): variances 9, 0, 1, ¼; three differ, ⌊0.67·3⌋ = 2 are selected: 1 and 3
    weights: squares 16 + 4 = 20 and 4 + 16 = 20, so ½ each
    signs: 4 − 2 > 0 keeps δ₁ alone, 4; 2 + 4 > 0 keeps both, ½·2 + ½·4 = 3
    """
    merged = merge("sce", torch.zeros(4), [tensor(4, 1, 2, 1), tensor(-2, 1, 4, 2)], select_topk=0.67)
    assert merged.tolist() == [4, 0, 3, 0]


def test_ram_as_published():
    """RAM (arXiv:2601.13572): what both changed is averaged, what one changed stays whole.

        δ₁ = (2, 4, 0, 0), δ₂ = (4, 0, 6, 0):  (3, 4, 6, 0)
    RAM+: each has one shared and one unique change: ratio 1, capped at α = ½; unique ones × (1 + 0.2·½) = 1.1.
    """
    models = [tensor(2, 4, 0, 0), tensor(4, 0, 6, 0)]
    assert merge("ram", torch.zeros(4), models).tolist() == [3, 4, 6, 0]
    plus = merge("ramplus_tl", torch.zeros(4), models, r=0.2, alpha=0.5)
    assert plus.tolist() == pytest.approx([3, 4.4, 6.6, 0])


def test_nearswap_by_hand():
    """w = min(1, t/|δ|), t = 1: δ = ½, 1, 4, −4 moves by ½, 1, 4·¼ = 1, −1."""
    merged = merge("nearswap", torch.full((4,), 10.0), [10 + tensor(0.5, 1, 4, -4)], t=1)
    assert merged.tolist() == [10.5, 11, 11, 9]


def test_arcee_fusion_by_hand():
    """Importance is |δ|·KL. A vector is one row and has one KL, which divides out of the comparison: |δ| decides.

    |δ| = 0.1·(1, 2, 3, 4, 5, 6, 7, 30): quartiles at the places ⌊7/4⌋ = 1, ⌊7/2⌋ = 3, ⌊21/4⌋ = 5 from 0: 2, 4, 6
    threshold 4 + 1.5·(6 − 2) = 10: only the last is an outlier and comes over
    """
    base, delta = torch.ones(8), 0.1 * tensor(1, -2, 3, -4, 5, -6, 7, 30)
    assert merge("arcee_fusion", base, [base + delta]).tolist() == [1] * 7 + [4]


def test_lines_as_published():
    """LiNeS (arXiv:2410.17146): λ(l) = α + β·(l − 1)/(L − 1); α = 0.2, β = 0.8, L = 5: 0.2, 0.4, 0.6, 0.8, 1."""
    scales = []
    for layer in range(5):
        context = TensorContext("w", layer=layer, num_layers=5)
        values = {"weight": 1, "alpha": 0.2, "beta": 0.8}
        scales.append(float(combine(get_method("lines"), torch.zeros(1), [torch.ones(1)], values, context)))
    assert scales == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_fisher_merging_as_published():
    """Fisher merging (arXiv:2111.09832): the mode of the product of two Gaussians with precisions F.

    θ = (F₁θ₁ + F₂θ₂)/(F₁ + F₂):  F = (3, 1), (1, 1), θ₁ = (4, 2), θ₂ = (0, 6):  (12/4, 8/2) = (3, 4)
    """
    context = TensorContext("w", statistics=(tensor(3, 1), tensor(1, 1)))
    values = {"fisher": ("one", "two")}
    merged = combine(get_method("fisher"), None, [tensor(4, 2), tensor(0, 6)], values, context)
    assert merged.tolist() == [3, 4]


def test_regmean_as_published_on_a_regression():
    """RegMean (arXiv:2212.09849), α = 1: the weights whose outputs are nearest to both models' own, in least squares.

    y = w·x. Model 1, w₁ = (1, 0), saw the inputs (1, 0), (1, 1); model 2, w₂ = (0, 2), saw (0, 1), (1, 1).
        G₁ = XᵀX = [[2, 1], [1, 1]],  G₂ = [[1, 1], [1, 2]],  ΣG = [[3, 2], [2, 3]], (ΣG)⁻¹ = [[3, −2], [−2, 3]]/5
        w₁G₁ + w₂G₂ = (2, 1) + (2, 4) = (4, 5);   w = (4·3 − 5·2, −4·2 + 5·3)/5 = (0.4, 1.4)
    The normal equations of the four rows (1,0)→1, (1,1)→1, (0,1)→2, (1,1)→2 say the same: residuals 0.6, −0.8, 0.6,
    0.2, whose products with the inputs add to 0.6 − 0.8 + 0.2 = 0 and −0.8 + 0.6 + 0.2 = 0.
    """
    grams = (torch.tensor([[2.0, 1], [1, 1]]), torch.tensor([[1.0, 1], [1, 2]]))
    context = TensorContext("w", statistics=grams)
    values = {"gram": ("one", "two"), "alpha": 1}
    merged = combine(get_method("regmean"), None, [tensor(1, 0)[None], tensor(0, 2)[None]], values, context)
    assert merged.flatten().tolist() == pytest.approx([0.4, 1.4])


def test_tsv_merge_as_published():
    """TSV-Merge (arXiv:2412.00081): two tasks, rank 2, so one direction each; both use nearly the same.

        δ₁ = 3·u₁v₁ᵀ with u₁ = (1, 0), v₁ = (1, 0);  δ₂ = 3·u₂v₂ᵀ with u₂ = (0.6, 0.8), v₂ = (0, 1)
    V = (v₁, v₂) is orthogonal already. U = (u₁, u₂) = [[1, 0.6], [0, 0.8]] is not; its nearest orthogonal matrix is the
    rotation by half of what separates them symmetrically: UᵀU = [[1, 0.6], [0.6, 1]] has eigenvalues 1.6 and 0.4, so
    (UᵀU)^(−½) = ½[[a+b, a−b], [a−b, a+b]] with a = 1/√1.6, b = 1/√0.4, and U⊥ = U(UᵀU)^(−½):
        a + b = 2.37171, a − b = −0.79057:   U⊥ = [[0.94868, 0.31623], [−0.31623, 0.94868]]
    The merge is U⊥·diag(3, 3)·V⊥ᵀ = 3·U⊥: no direction is stronger than 3, where δ₁ + δ₂ reaches 3·√1.6 = 3.79.
    """
    one = 3 * torch.outer(tensor(1, 0), tensor(1, 0))
    two = 3 * torch.outer(tensor(0.6, 0.8), tensor(0, 1))
    merged = merge("tsv", torch.zeros(2, 2), [one, two])
    assert merged.flatten().tolist() == pytest.approx([3 * 0.94868, 3 * 0.31623, -3 * 0.31623, 3 * 0.94868], abs=1e-4)


def test_iso_c_as_published():
    """Iso-C (arXiv:2502.04959): Σδ = UΣVᵀ with singular values 3 and 1 becomes U·diag(2, 2)·Vᵀ.

    Σδ = [[0, 3], [1, 0]] = 3·e₁e₂ᵀ + 1·e₂e₁ᵀ  →  [[0, 2], [2, 0]];  λ = ½ halves it.
    """
    models = [torch.tensor([[0.0, 3], [0, 0]]), torch.tensor([[0.0, 0], [1, 0]])]
    merged = merge("iso_c", torch.zeros(2, 2), models, lambda_=0.5)
    assert merged.flatten().tolist() == pytest.approx([0, 1, 1, 0], abs=1e-6)


def test_iso_cts_as_published():
    """Iso-CTS (arXiv:2502.04959): the weakest common directions give way to the strongest of each task's own.

    δ₁ = diag(6, 2, 0, 0), δ₂ = diag(6, 0, 1, 0), common_fraction ½ of rank 4: two directions are common, one is each
    task's. Σδ = diag(12, 2, 1, 0): common are e₁ (12) and e₂ (2). Without them, δ₁ has nothing left and δ₂ has e₃ (1).
        mean strength (12 + 2 + 0 + 1)/4 = 3.75 in every direction that is determined: e₁, e₂, e₃
    """
    models = [torch.diag(tensor(6, 2, 0, 0)), torch.diag(tensor(6, 0, 1, 0))]
    merged = merge("iso_cts", torch.zeros(4, 4), models, common_fraction=0.5)
    assert merged.diagonal()[:3].tolist() == pytest.approx([3.75] * 3, abs=1e-5)
    assert torch.linalg.svdvals(merged)[:3].tolist() == pytest.approx([3.75] * 3, abs=1e-5)
