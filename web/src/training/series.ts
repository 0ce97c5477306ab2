/** Rows of metrics as lines to draw: no drawing here, so that it can be tested without a page. */

export type Row = Record<string, number | string | boolean | null>;
export type Axis = "step" | "tokens" | "elapsed_s";

/** What one chart shows: a metric in training, and where it is known on held-out data. */
export interface Panel {
  metric: string;
  lines: string[]; // the metrics drawn, `val_` last
}

export interface Point {
  x: number;
  y: number;
  step: number;
}

const FIRST = [
  "loss", "bits_per_byte", "accuracy", "reward", "kl", "margin", "mrr", "entropy", "clip_fraction",
  "explained_variance",
]; // prettier-ignore
const LAST = ["lr", "grad_norm", "tokens_per_s", "mfu"];
const NO_METRIC = new Set(["step", "tokens", "elapsed_s"]);

/** Charts for the metrics that the rows know, in the order in which they are looked at. */
export function panels(rows: Row[]): Panel[] {
  const known = new Set<string>();
  for (const row of rows) {
    for (const [key, value] of Object.entries(row)) if (typeof value === "number") known.add(key);
  }
  const charts = new Map<string, string[]>();
  for (const key of known) {
    if (NO_METRIC.has(key)) continue;
    // By language they belong to the same chart.
    const metric = key.replace(/^val_/, "").replace(/^(bits_per_byte)_\w+$/, "$1");
    charts.set(metric, [...(charts.get(metric) ?? []), key]);
  }
  const rank = (metric: string) => {
    const [first, last] = [FIRST.indexOf(metric), LAST.indexOf(metric)];
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
  const found: Point[] = [];
  for (const row of rows) {
    const [x, y] = [row[axis], row[metric]];
    if (typeof x === "number" && typeof y === "number") found.push({ x, y, step: row.step as number });
  }
  return found;
}

/** Exponential moving average with the bias of its start removed, as the trainer's own picture. */
export function smoothed(given: Point[], weight: number): Point[] {
  if (!weight) return given;
  let average = 0;
  let left = 1;
  return given.map((point) => {
    average = weight * average + (1 - weight) * point.y;
    left *= weight;
    return { ...point, y: average / (1 - left) };
  });
}

/** The point nearest to `x`; `given` is in the order of x. */
export function nearest(given: Point[], x: number): Point | null {
  let [low, high] = [0, given.length - 1];
  if (high < 0) return null;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (given[middle]!.x <= x) low = middle;
    else high = middle;
  }
  const [a, b] = [given[low]!, given[high]!];
  return Math.abs(a.x - x) <= Math.abs(b.x - x) ? a : b;
}

export interface Scale {
  from: number;
  to: number;
  ticks: number[];
  at: (value: number) => number; // 0 to 1
}

/** A scale with round ticks that holds all values; `log` only where all of them are above 0. */
export function scale(values: number[], count: number, log = false): Scale {
  let [from, to] = [Infinity, -Infinity];
  for (const value of values) {
    if (log && value <= 0) continue;
    if (value < from) from = value;
    if (value > to) to = value;
  }
  if (from > to) [from, to] = [log ? 1 : 0, log ? 10 : 1];
  if (log) return logarithmic(from, to, count);
  if (alike(from, to)) {
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

/** But for their rounding: the steps between such values would be too small to be counted. */
function alike(from: number, to: number): boolean {
  return to - from <= 1e-12 * Math.max(Math.abs(from), Math.abs(to));
}

function roundStep(rough: number): number {
  const power = 10 ** Math.floor(Math.log10(rough));
  const digit = rough / power;
  return power * (digit <= 1 ? 1 : digit <= 2 ? 2 : digit <= 5 ? 5 : 10);
}

function logarithmic(from: number, to: number, count: number): Scale {
  if (alike(from, to)) [from, to] = [from / 2, to * 2];
  const [low, high] = [Math.log10(from), Math.log10(to)];
  const at = (value: number) => (Math.log10(value) - low) / (high - low);
  const ticks: number[] = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
    for (const digit of high - low > 2 ? [1] : [1, 2, 5]) {
      const value = Number((digit * 10 ** power).toPrecision(12));
      if (value >= from && value <= to) ticks.push(value);
    }
  }
  // Within less than a power of ten there may be no round one.
  if (ticks.length < 2) return { from, to, ticks: scale([from, to], count).ticks.filter((v) => v >= from && v <= to), at };
  const every = Math.ceil(ticks.length / (count + 1));
  return { from, to, ticks: ticks.filter((_, i) => i % every === 0), at };
}

/** `0.00123`, `1.2e-5`, `12,345`: as many digits as tell values of this size apart. */
export function shown(value: number, language = "en"): string {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace(/\.?0+e/, "e");
  if (size >= 1000) return Math.round(value).toLocaleString(language);
  return String(Number(value.toPrecision(4)));
}

/** Later rows behind those that are there; a run that was begun again takes their place. */
export function joined(before: Row[], after: Row[]): Row[] {
  const first = after[0]?.step;
  if (typeof first !== "number") return before;
  return [...before.filter((row) => (row.step as number) < first), ...after];
}

/** Values of a nested configuration by their dotted names. */
export function flat(config: unknown, name = ""): Map<string, string> {
  const found = new Map<string, string>();
  if (config !== null && typeof config === "object" && !Array.isArray(config)) {
    for (const [key, value] of Object.entries(config)) {
      for (const [inner, text] of flat(value, name ? `${name}.${key}` : key)) found.set(inner, text);
    }
  } else if (name) found.set(name, typeof config === "string" ? config : JSON.stringify(config));
  return found;
}

/** Keys and their values in each configuration; only those that differ, unless `all`. */
export function differing(configs: unknown[], all = false): [string, (string | undefined)[]][] {
  const flats = configs.map((config) => flat(config));
  const keys = [...new Set(flats.flatMap((each) => [...each.keys()]))].sort();
  return keys
    .map((key): [string, (string | undefined)[]] => [key, flats.map((each) => each.get(key))])
    .filter(([, values]) => all || new Set(values).size > 1);
}
