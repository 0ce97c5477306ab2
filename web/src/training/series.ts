/** Metrics as series to draw, without any drawing, so that it can be tested without a page. */

export type Row = Record<string, number | string | boolean | null>;
export type Axis = "step" | "tokens" | "elapsed_s";

/** One chart: a metric in training and, if available, on held-out data. */
export interface Panel {
  metric: string;
  lines: string[]; // names of the metrics, `val_` last
}

export interface Point {
  x: number;
  y: number;
  step: number;
}

const FIRST_METRICS = [
  "loss", "bits_per_byte", "accuracy", "reward", "kl", "margin", "mrr", "entropy", "clip_fraction",
  "explained_variance",
]; // prettier-ignore
const LAST_METRICS = ["lr", "grad_norm", "tokens_per_s", "mfu"];
const AXES = new Set(["step", "tokens", "elapsed_s"]);

/** Charts for the metrics in the rows, the most important first. */
export function panels(rows: Row[]): Panel[] {
  const names = new Set<string>();
  for (const row of rows) {
    for (const [key, value] of Object.entries(row)) if (typeof value === "number") names.add(key);
  }
  const charts = new Map<string, string[]>();
  for (const key of names) {
    if (AXES.has(key)) continue;
    // Metrics per language share a chart.
    const metric = key.replace(/^val_/, "").replace(/^(bits_per_byte)_\w+$/, "$1");
    charts.set(metric, [...(charts.get(metric) ?? []), key]);
  }
  const rank = (metric: string) => {
    const [first, last] = [FIRST_METRICS.indexOf(metric), LAST_METRICS.indexOf(metric)];
    if (first >= 0) return first;
    return last >= 0 ? 1000 + last : 100;
  };
  return [...charts]
    .map(([metric, lines]) => ({
      metric,
      lines: lines.sort((a, b) => +isHeldOut(a) - +isHeldOut(b) || (a < b ? -1 : 1)),
    }))
    .sort((a, b) => rank(a.metric) - rank(b.metric) || (a.metric < b.metric ? -1 : 1));
}

export function isHeldOut(metric: string): boolean {
  return metric.startsWith("val_");
}

export function points(rows: Row[], metric: string, axis: Axis): Point[] {
  const result: Point[] = [];
  for (const row of rows) {
    const [x, y] = [row[axis], row[metric]];
    if (Number.isFinite(x) && Number.isFinite(y)) result.push({ x: x as number, y: y as number, step: row.step as number });
  }
  return result;
}

/** Exponential moving average with bias correction, as in the trainer's plots. */
export function smoothed(points: Point[], weight: number): Point[] {
  if (!weight) return points;
  let average = 0;
  let bias = 1;
  return points.map((point) => {
    average = weight * average + (1 - weight) * point.y;
    bias *= weight;
    return { ...point, y: average / (1 - bias) };
  });
}

/** The point nearest to `x`; `points` are sorted by x. */
export function nearest(points: Point[], x: number): Point | null {
  let [low, high] = [0, points.length - 1];
  if (high < 0) return null;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle]!.x <= x) low = middle;
    else high = middle;
  }
  const [a, b] = [points[low]!, points[high]!];
  return Math.abs(a.x - x) <= Math.abs(b.x - x) ? a : b;
}

export interface Scale {
  from: number;
  to: number;
  ticks: number[];
  at: (value: number) => number; // 0 to 1
}

/** A scale with round ticks that covers all values; a logarithmic one ignores values up to 0. */
export function scale(values: number[], count: number, log = false): Scale {
  let [from, to] = [Infinity, -Infinity];
  for (const value of values) {
    if (log && value <= 0) continue;
    if (value < from) from = value;
    if (value > to) to = value;
  }
  if (from > to) [from, to] = [log ? 1 : 0, log ? 10 : 1];
  if (log) return logarithmic(from, to, count);
  if (nearlyEqual(from, to)) {
    const around = Math.abs(from) / 10 || 1;
    [from, to] = [from - around, to + around];
  }
  const step = roundStep((to - from) / count);
  const [first, last] = [Math.floor(from / step), Math.ceil(to / step)];
  const ticks: number[] = [];
  for (let i = first; i <= last; i++) ticks.push(Number((i * step).toPrecision(12)));
  const [low, high] = [first * step, last * step];
  return { from: low, to: high, ticks, at: (value) => (value - low) / (high - low) };
}

/** Equal up to rounding: the ticks between such values would coincide. */
function nearlyEqual(from: number, to: number): boolean {
  return to - from <= 1e-12 * Math.max(Math.abs(from), Math.abs(to));
}

function roundStep(rough: number): number {
  const power = 10 ** Math.floor(Math.log10(rough));
  const digit = rough / power;
  return power * (digit <= 1 ? 1 : digit <= 2 ? 2 : digit <= 5 ? 5 : 10);
}

function logarithmic(from: number, to: number, count: number): Scale {
  if (nearlyEqual(from, to)) [from, to] = [from / 2, to * 2];
  const [low, high] = [Math.log10(from), Math.log10(to)];
  const at = (value: number) => (Math.log10(value) - low) / (high - low);
  const ticks: number[] = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
    for (const digit of high - low > 2 ? [1] : [1, 2, 5]) {
      const value = Number((digit * 10 ** power).toPrecision(12));
      if (value >= from && value <= to) ticks.push(value);
    }
  }
  // A range below a power of ten may contain no round value.
  if (ticks.length < 2) return { from, to, ticks: scale([from, to], count).ticks.filter((v) => v >= from && v <= to), at };
  const every = Math.ceil(ticks.length / (count + 1));
  return { from, to, ticks: ticks.filter((_, i) => i % every === 0), at };
}

/** A number with a suitable number of digits: `0.00123`, `1.2e-5`, `12,345`. */
export function formatNumber(value: number, language = "en"): string {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace(/\.?0+e/, "e");
  if (size >= 1000) return Math.round(value).toLocaleString(language);
  return String(Number(value.toPrecision(4)));
}

/** Append later rows; the rows of a restarted run replace those from the same step on. */
export function appendRows(before: Row[], after: Row[]): Row[] {
  const first = after[0]?.step;
  if (typeof first !== "number") return before;
  return [...before.filter((row) => (row.step as number) < first), ...after];
}

/** Values of a nested configuration by their dotted names. */
export function flatten(config: unknown, name = ""): Map<string, string> {
  const values = new Map<string, string>();
  if (config !== null && typeof config === "object" && !Array.isArray(config)) {
    for (const [key, value] of Object.entries(config)) {
      for (const [inner, text] of flatten(value, name ? `${name}.${key}` : key)) values.set(inner, text);
    }
  } else if (name) values.set(name, typeof config === "string" ? config : JSON.stringify(config));
  return values;
}

/** Keys with their values in each configuration; only those that differ, unless `all`. */
export function differences(configs: unknown[], all = false): [string, (string | undefined)[]][] {
  const flats = configs.map((config) => flatten(config));
  const keys = [...new Set(flats.flatMap((each) => [...each.keys()]))].sort();
  return keys
    .map((key): [string, (string | undefined)[]] => [key, flats.map((each) => each.get(key))])
    .filter(([, values]) => all || new Set(values).size > 1);
}
