"""Explicit Runge-Kutta methods as data: every tableau, error estimate and interpolant in one place.

A step of size h from (t, y) with a tableau of S stages reads

    k_i = f(t + c_i h, y + h sum_{j<i} a_ij k_j),    y1 = y + h sum_i b_i k_i,
    error estimate = h sum_i e_i k_i,                y(t + theta h) = y + h sum_i b_i(theta) k_i.

Nothing here is trusted: the tests check each number through the order conditions of rooted trees.

All adaptive methods are in FSAL form (first same as last): the last stage is the slope f(t1, y1),
which the next step takes as its first. Where the error estimate does not need that slope,
``e[-1] == 0`` and a solver need only evaluate it once the step is accepted.

Sources: Dormand and Prince (1980) with the error weights and the midpoint of Shampine (1986);
Tsitouras (2011); Bogacki and Shampine (1989); Prince and Dormand (1981) with the interpolant of
Bogacki and Shampine (1990); Verner (2010); Fehlberg (1969); Kutta (1901); Heun (1900).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

__all__ = ["TABLEAUS", "Tableau", "quartic_from_mid"]

Vector = tuple[float, ...]
Matrix = tuple[Vector, ...]


@dataclass(frozen=True)
class Tableau:
    """One explicit method of S stages.

    Attributes:
        name: the name users give as ``method``.
        order: order of the solution that is propagated.
        c: abscissae [S].
        a: stage weights; row i has i entries.
        b: weights of the new state [S].
        dense: interpolant [S + extra, D]: ``b_i(theta) = sum_m dense[i][m - 1] theta**m``. It is
            continuously differentiable across steps: ``b_i(1) = b_i``, and its slopes at 0 and 1
            are f(t, y) and f(t1, y1).
        dense_order: order of the interpolant: within a step its error is O(h**(dense_order + 1)).
        e: error weights [S], ``b`` minus the embedded solution's; None: for fixed steps only.
        error_order: q of the step controller's exponent -1/q, torchdiffeq's (0: no estimate).
        mid: weights [S] of the value halfway on which torchdiffeq builds its quartic; None where
            torchdiffeq has no such method, or no interpolant for it.
        extra_c: abscissae of the further stages that ``dense`` needs, evaluated only where used.
        extra_a: their weights; row i has S + i entries.
    """

    name: str
    order: int
    c: Vector
    a: Matrix
    b: Vector
    dense: Matrix
    dense_order: int
    e: Vector | None = None
    error_order: int = 0
    mid: Vector | None = None
    extra_c: Vector = ()
    extra_a: Matrix = ()

    @property
    def stages(self) -> int:
        """Number of stages S, the extra ones of the interpolant not counted."""
        return len(self.c)

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its error."""
        return self.e is not None

    @property
    def error_needs_last_stage(self) -> bool:
        """Whether the error estimate uses f(t1, y1); if not, a rejected step can spare it."""
        return self.e is not None and self.e[-1] != 0.0


def quartic_from_mid(tableau: Tableau) -> Matrix:
    """Torchdiffeq's interpolant as weights.

    It is the quartic through y, the value halfway and y1 with slopes f(t, y) and f(t1, y1).

    Args:
        tableau: an adaptive tableau, whose last stage is f(t1, y1).

    Returns:
        A matrix [S, 4] in the form of ``Tableau.dense``.

    Raises:
        ValueError: the tableau has no weights ``mid``.
    """
    if tableau.mid is None:
        raise ValueError(
            f"quartic_from_mid needs a tableau with midpoint weights; {tableau.name!r} has none. "
            f"Use an adaptive method."
        )
    last = len(tableau.b) - 1
    rows = []
    for i, (b, mid) in enumerate(zip(tableau.b, tableau.mid, strict=True)):
        first_slope, last_slope = float(i == 0), float(i == last)
        rows.append(
            (
                first_slope,
                last_slope - 4 * first_slope - 5 * b + 16 * mid,
                5 * first_slope - 3 * last_slope + 14 * b - 32 * mid,
                2 * (last_slope - first_slope) - 8 * b + 16 * mid,
            )
        )
    return tuple(rows)


# How tableaus are written below: numbers parted by blanks, rows by semicolons. Fractions and
# decimals are read exactly and rounded once.


def _rows(text: str) -> Matrix:
    return tuple(tuple(float(Fraction(word)) for word in row.split()) for row in text.split(";"))


def _row(text: str) -> Vector:
    (row,) = _rows(text)
    return row


def _differences(minuend: str, subtrahend: str) -> Vector:
    pairs = zip(minuend.split(), subtrahend.split(), strict=True)
    return tuple(float(Fraction(x) - Fraction(y)) for x, y in pairs)


def _half(coefficients: Sequence[float]) -> float:
    """The value at theta = 1/2 of a polynomial without constant term."""
    return sum(x * 0.5**m for m, x in enumerate(coefficients, start=1))


def _hermite(b: Sequence[float], last: int) -> Matrix:
    """Cubic through y and y1 with slopes k_0 and k_last, as weights [S, 3]."""
    rows = []
    for i, weight in enumerate(b):
        first_slope, last_slope = float(i == 0), float(i == last)
        rows.append(
            (
                first_slope,
                3 * weight - 2 * first_slope - last_slope,
                first_slope + last_slope - 2 * weight,
            )
        )
    return tuple(rows)


def _fixed(name: str, order: int, c: str, a: str, b: str) -> Tableau:
    """A method for fixed steps; its interpolant takes f(t1, y1) as an extra stage."""
    weights = _row(b)
    return Tableau(
        name=name,
        order=order,
        c=_row(c),
        a=((), *_rows(a)) if a else ((),),
        b=weights,
        dense=_hermite((*weights, 0.0), last=len(weights)),
        dense_order=min(order, 3),
        extra_c=(1.0,),
        extra_a=(weights,),
    )


_EULER = _fixed("euler", 1, c="0", a="", b="1")
_MIDPOINT = _fixed("midpoint", 2, c="0 1/2", a="1/2", b="0 1")
_HEUN2 = _fixed("heun2", 2, c="0 1", a="1", b="1/2 1/2")
_HEUN3 = _fixed("heun3", 3, c="0 1/3 2/3", a="1/3; 0 2/3", b="1/4 0 3/4")
# Kutta's 3/8 rule: the smallest error constants among the classical ones.
_RK4 = _fixed("rk4", 4, c="0 1/3 2/3 1", a="1/3; -1/3 1; 1 -1 1", b="1/8 3/8 3/8 1/8")


def _second_order(name: str, c: str, a: str, b: str, e: str, mid: str) -> Tableau:
    weights = _row(b)
    return Tableau(
        name=name,
        order=2,
        c=_row(c),
        a=((), *_rows(a)),
        b=weights,
        e=_row(e),
        error_order=2,
        mid=_row(mid),
        dense=_hermite(weights, last=len(weights) - 1),
        dense_order=2,
    )


_ADAPTIVE_HEUN = _second_order(
    "adaptive_heun",
    c="0 1 1",
    a="1; 1/2 1/2",
    b="1/2 1/2 0",
    e="1/2 -1/2 0",
    mid="1/2 0 0",
)
_FEHLBERG2 = _second_order(
    "fehlberg2",
    c="0 1/2 1 1",
    a="1/2; 1/256 255/256; 1/512 255/256 1/512",
    b="1/512 255/256 1/512 0",
    e="-1/512 0 1/512 0",
    mid="0 1/2 0 0",
)

_BOSH3_B = _row("2/9 1/3 4/9 0")
_BOSH3 = Tableau(
    name="bosh3",
    order=3,
    c=_row("0 1/2 3/4 1"),
    a=((), *_rows("1/2; 0 3/4; 2/9 1/3 4/9")),
    b=_BOSH3_B,
    e=_differences("2/9 1/3 4/9 0", "7/24 1/4 1/3 1/8"),
    error_order=3,
    mid=_row("0 1/2 0 0"),
    dense=_hermite(_BOSH3_B, last=3),
    dense_order=3,
)

_DOPRI5_B = "35/384 0 500/1113 125/192 -2187/6784 11/84 0"
_DOPRI5_MID = tuple(
    weight / 2
    for weight in _row("""
    6025192743/30085553152 0 51252292925/65400821598 -2691868925/45128329728
      187940372067/1594534317056 -1776094331/19743644256 11237099/235043384
""")
)
_DOPRI5_STEP = Tableau(
    name="dopri5",
    order=5,
    c=_row("0 1/5 3/10 4/5 8/9 1 1"),
    a=(
        (),
        *_rows("""
    1/5;
    3/40 9/40;
    44/45 -56/15 32/9;
    19372/6561 -25360/2187 64448/6561 -212/729;
    9017/3168 -355/33 46732/5247 49/176 -5103/18656;
    35/384 0 500/1113 125/192 -2187/6784 11/84
"""),
    ),
    b=_row(_DOPRI5_B),
    e=_differences(_DOPRI5_B, "1951/21600 0 22642/50085 451/720 -12231/42400 649/6300 1/60"),
    error_order=5,
    mid=_DOPRI5_MID,
    dense=(),
    dense_order=4,
)
# Shampine chose the value halfway so that the quartic has order 4.
_DOPRI5 = replace(_DOPRI5_STEP, dense=quartic_from_mid(_DOPRI5_STEP))

_TSIT5_A = _rows("""
    0.161;
    -0.008480655492356988544427 0.3354806554923569885444;
    2.89715305710549343213 -6.359448489975074843148 4.362295432869581411018;
    5.325864828439256604429 -11.74888356406282787775 7.495539342889836208305
      -0.0924950663617552492565;
    5.861455442946420028659 -12.92096931784710929171 8.15936789857615864318
      -0.07158497328140099722453 -0.028269050394068382909;
    0.09646076681806522951817 0.01 0.4798896504144995747752 1.379008574103741893192
      -3.290069515436080679901 2.324710524099773982415
""")
_TSIT5_DENSE = _rows("""
    1 -2.76370619727482587 2.91325546182191266 -1.05308849772902156;
    0 0.1317 -0.2234 0.1017;
    0 3.93029623689475152 -5.94103387213150474 2.49062728565125279;
    0 -12.411077166933677 30.3381886302823217 -16.5481028892449027;
    0 37.5093134165110392 -88.1789048947664011 47.3795219628192812;
    0 -27.8965262891972878 65.0918946747936715 -34.8706578614966097;
    0 1.5 -4 2.5
""")
_TSIT5 = Tableau(
    name="tsit5",
    order=5,
    c=_row("0 161/1000 327/1000 9/10 0.9800255409045096857298 1 1"),
    a=((), *_TSIT5_A),
    b=(*_TSIT5_A[-1], 0.0),
    # The sign of the last weight is wrong in the paper.
    e=_row("""
    0.001780011052225771443379 0.0008164344596567469032236 -0.007880878010261996010315
      0.1447110071732629075372 -0.5823571654525552250199 0.4580821059291869466616 -1/66
"""),
    error_order=5,
    mid=tuple(_half(weights) for weights in _TSIT5_DENSE),
    dense=_TSIT5_DENSE,
    dense_order=4,
)

_DOPRI8_B = """
    14005451/335480064 0 0 0 0 -59238493/1068277825 181606767/758867731 561292985/797845732
      -1041891430/1371343529 760417239/1151165299 118820643/751138087 -528747749/2220607170 1/4 0
"""
_DOPRI8 = Tableau(
    name="dopri8",
    order=8,
    c=_row("""
    0 1/18 1/12 1/8 5/16 3/8 59/400 93/200 5490023248/9719169821 13/20 1201146811/1299019798 1 1 1
"""),
    a=(
        (),
        *_rows("""
    1/18;
    1/48 1/16;
    1/32 0 3/32;
    5/16 0 -75/64 75/64;
    3/80 0 0 3/16 3/20;
    29443841/614563906 0 0 77736538/692538347 -28693883/1125000000 23124283/1800000000;
    16016141/946692911 0 0 61564180/158732637 22789713/633445777 545815736/2771057229
      -180193667/1043307555;
    39632708/573591083 0 0 -433636366/683701615 -421739975/2616292301 100302831/723423059
      790204164/839813087 800635310/3783071287;
    246121993/1340847787 0 0 -37695042795/15268766246 -309121744/1061227803 -12992083/490766935
      6005943493/2108947869 393006217/1396673457 123872331/1001029789;
    -1028468189/846180014 0 0 8478235783/508512852 1311729495/1432422823 -10304129995/1701304382
      -48777925059/3047939560 15336726248/1032824649 -45442868181/3398467696 3065993473/597172653;
    185892177/718116043 0 0 -3185094517/667107341 -477755414/1098053517 -703635378/230739211
      5731566787/1027545527 5232866602/850066563 -4093664535/808688257 3962137247/1805957418
      65686358/487910083;
    403863854/491063109 0 0 -5068492393/434740067 -411421997/543043805 652783627/914296604
      11173962825/925320556 -13158990841/6184727034 3936647629/1978049680 -160528059/685178525
      248638103/1413531060 0;
    14005451/335480064 0 0 0 0 -59238493/1068277825 181606767/758867731 561292985/797845732
      -1041891430/1371343529 760417239/1151165299 118820643/751138087 -528747749/2220607170 1/4
"""),
    ),
    b=_row(_DOPRI8_B),
    e=_differences(
        _DOPRI8_B,
        """
    13451932/455176623 0 0 0 0 -808719846/976000145 1757004468/5645159321 656045339/265891186
      -3867574721/1518517206 465885868/322736535 53011238/667516719 2/45 0 0
""",
    ),
    error_order=8,
    mid=_row("""
    0.041031303607394012375 0 0 0 0 0.051005628019913445687 0.23889306774121999661
      0.30968701439961029227 -0.21723254717553502901 0.078334056793319246169
      -0.0018614369715580260344 0.0070728442026784521391 0.0069084737320050937391
      -0.013838404349047483961
"""),
    dense=_rows("""
    1 -6.6910181737837595697 19.999006933368397061 -30.0610568289666450593 22.1396504998094068976
      -6.3448349392860401388;
    0 0 0 0 0 0;
    0 0 0 0 0 0;
    0 0 0 0 0 0;
    0 0 0 0 0 0;
    0 -7.6142658045872677172 52.227353279294552405 -121.4999627731334642623
      116.4422149550342161651 -39.6107919852202505218;
    0 10.7281392630428866124 -46.8919164181093621583 83.1721004639847717481
      -67.1451318825957197185 20.3761213808791436958;
    0 0.5526637063753648783 -0.1890893225010595467 9.5724507555993664382 -16.5672243527496524646
      7.3347098826795362023;
    0 4.2186562625665153803 -35.7075975946222072821 87.8406057677205645007 -89.9916014847245016028
      32.8801774352459155182;
    0 -0.6627209125361597559 6.273644808324035216 -17.4152107770762969005 22.6237489648532849093
      -10.1588990526426760954;
    0 -1.2636789001135462218 10.3160881272450748458 -28.5903289514790976966 32.2362340167355370113
      -12.54012680987825612;
    0 5.410603789859042223 -34.7650769866611817349 81.6630950584341412934 -82.1020315488359848644
      29.5553001484516038033;
    0 -7.0321379067945741781 47.7457971078225540396 -114.937529137700941817
      116.2662185791119533462 -41.7923486424390588923;
    0 2.3537586759714983486 -19.0082099341608028453 50.2558364226176017553 -53.9020777466385396792
      20.3006925822100825485
"""),
    dense_order=5,
)

_VERN7_B = _row("""
    0.04715561848627222170432 0 0 0.2575056429843415189596 0.2621665397741262047714
      0.1521609265673855740323 0.4939969170032484246907 -0.2943031171403250441557
      0.08131747232495109999735 0
""")
_VERN7 = Tableau(
    name="vern7",
    order=7,
    c=(
        *_row("""
    0 1/200 49/450 49/300 911/2000 3480084980/5709648941 221/250 37/40 1 1
"""),
        1.0,
    ),
    a=(
        (),
        *_rows("""
    1/200;
    -4361/4050 2401/2025;
    49/1200 0 49/400;
    2454451729/3841600000 0 -9433712007/3841600000 4364554539/1920800000;
    -2.661577375018757131119 0 10.80451388645613769565 -8.353914657396199411968
      0.820487594956656979142;
    6.067741434696770992718 0 -24.71127363591108579734 20.42751793078889394046
      -1.906157978816647150624 1.00617224924206801479;
    12.05467007625320299509 0 -49.75478495046898932807 41.1428886386046766326
      -4.461760149974004185642 2.042334822239174959822 -0.09834843665406107379531;
    10.13814652288180787642 0 -42.64113603171750214623 35.76384003992257007135
      -4.34802284039290765334 2.009862268377035895442 0.3487490460338272405954
      -0.2714390051048312842372;
    -45.03007203429867712435 0 187.3272437654588840752 -154.0288236935018690597
      18.56465306347536233859 -7.141809679295078854925 1.308808578161378625115 0 0
"""),
        _VERN7_B,
    ),
    b=(*_VERN7_B, 0.0),
    e=(
        *_row("""
    0.002547011879931045416999 0 0 -0.009658394872795749091267 0.04206470975639690277341
      -0.066682243746930109066 0.2650097464621281363529 -0.2943031171403250441557
      0.08131747232495109999735 -0.02029518466335628222767
"""),
        0.0,
    ),
    error_order=7,
    extra_c=_row("29/100 1/8 1/4 53/100 79/100"),
    extra_a=_rows("""
    0.05232227691599689815471 0 0 0.2249586182670571550244 0.01744370924877637539032
      -0.007669379876829393188009 0.03435896044073284645684 -0.04102097230093949839125
      0.02565113300520561655297 0 -160443457/10000000000;
    0.05305334125785908638835 0 0 0.1219530101140188607092 0.01774684073760249704012
      -0.0005928372667681494328907 0.008381833970853750873625 -0.01293369259698611956701
      0.009412056815253860804791 0 -0.005353253107275676032399 -0.0666672999245581107838;
    0.038879032574363036864 0 0 -0.00244032033083013151791 -0.001392891721467262281273
      -0.0004744629155868013465038 0.0003920793241315951369384 -0.0004055473328512800136386
      0.0001989709314771672628794 0 -0.0001027819879317916884713 0.03385661513870266715303
      0.181489306319992800431;
    0.05723681204690012909607 0 0 0.2226594806676118099286 0.1234486420018689904911
      0.04006332526666490875114 -0.05269894848581452066926 0.04765971214244522856887
      -0.02138895885042213036388 0 0.0151938910640364016546 0.1206054671628965554251
      -0.02277942301618737288237 0;
    0.05137203880275681426596 0 0 0.5414214473439405582401 0.3503998066921840081155
      0.1419311226969218216862 0.1052737747842942254816 -0.03108184780587401700843
      -0.007401883149519145061792 0 -0.00637793250486536343757 -0.1732549590836186403386
      -0.182281567776220261943 0 0
"""),
    dense=_rows("""
    1 -8.4133871983327674693 33.675508884490896545 -70.801590894848861646 80.64695108301297873
      -47.194139698375215801 11.133813442539241864;
    0 0 0 0 0 0 0;
    0 0 0 0 0 0 0;
    0 8.7549219806743971606 -88.459682869977094261 346.90176384299163095 -629.25800300598370468
      529.67737556041929839 -167.35886986514018604;
    0 8.913387586637921663 -90.060818468932177947 353.1807459217057825 -640.64768197443744337
      539.26462790471552616 -170.38809442991548279;
    0 5.1733120298478003389 -52.271115900055388234 204.98538673740730947 -371.83061185636028909
      312.98809343745290002 -98.892903521724946936;
    0 16.795377440796959864 -169.70040000059727444 665.49377270092463031 -1207.1638892336007284
      1016.1291515818546033 -321.06001557237494219;
    0 -10.005997536098664769 101.10054330522750682 -396.4739151237843755 719.17877070141829141
      -605.36810339188243508 191.27439892797935207;
    0 2.7647088336385991397 -27.934602637390461781 109.54779186137892178 -198.71281130644821164
      167.26633571640316707 -52.850104995257063466;
    0 0 0 0 0 0 0;
    0 -2.1696320280163504812 22.016696037569876256 -86.901524277989483508 159.22388973861474437
      -135.96183065345879084 43.792401183280004198;
    0 -4.8900701887938039338 22.754077374251761208 -30.780342185377309651 -2.7971943172072490211
      31.369456637508401832 -15.655927320381800434;
    0 10.862170929551967155 -50.542971417827106972 68.371480404075118276 6.2133265216324091626
      -69.680063231941581042 34.77605679450919342;
    0 -11.372866919229229159 130.79058078246716441 -488.65113677785602075 832.21487932764408735
      -664.77433685544262429 201.79288044241662244;
    0 -5.9197787327150066987 63.276799658892188293 -265.43268208873795758 520.10092541406108248
      -467.4121095339020119 155.3868452824017054;
    0 -10.49214619796182281 105.3553852518801101 -409.43975011988938465 732.83144890765403269
      -606.3044574733512378 188.04951963166830246
"""),
    dense_order=6,
)

TABLEAUS: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        _EULER,
        _MIDPOINT,
        _HEUN2,
        _HEUN3,
        _RK4,
        _ADAPTIVE_HEUN,
        _FEHLBERG2,
        _BOSH3,
        _DOPRI5,
        _TSIT5,
        _DOPRI8,
        _VERN7,
    )
}
