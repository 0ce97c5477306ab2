import { expect, test } from "vitest";
import {
  differences, appendRows, nearest, panels, points, scale, formatNumber, smoothed, type Row,
} from "../src/training/series"; // prettier-ignore

const rows: Row[] = [
  { step: 1, tokens: 10, loss: 4, lr: 0.1, tokens_per_s: 5, name: "x", accuracy: null },
  { step: 2, tokens: 20, loss: null, lr: 0.1, val_loss: 3.5, val_bits_per_byte: 2, accuracy: 0.5 },
  { step: 3, tokens: 30, loss: 2, lr: 0.05, val_bits_per_byte_zh: 1, val_bits_per_byte_en: 3, odd: 1 },
];

test("charts are sorted by importance", () => {
  expect(panels(rows)).toEqual([
    { metric: "loss", lines: ["loss", "val_loss"] },
    {
      metric: "bits_per_byte",
      lines: ["val_bits_per_byte", "val_bits_per_byte_en", "val_bits_per_byte_zh"],
    },
    { metric: "accuracy", lines: ["accuracy"] },
    { metric: "odd", lines: ["odd"] },
    { metric: "lr", lines: ["lr"] },
    { metric: "tokens_per_s", lines: ["tokens_per_s"] },
  ]);
});

test("values that are not numbers leave gaps", () => {
  expect(points(rows, "loss", "tokens")).toEqual([
    { x: 10, y: 4, step: 1 },
    { x: 30, y: 2, step: 3 },
  ]);
});

test("smoothing starts at the first value and preserves constants", () => {
  const constant = [3, 3, 3].map((y, x) => ({ x, y, step: x }));
  for (const { y } of smoothed(constant, 0.9)) expect(y).toBeCloseTo(3, 12);
  const rising = [0, 1].map((y, x) => ({ x, y, step: x }));
  // (0.5 * 0 + 0.5 * 1) / (1 - 0.25)
  expect(smoothed(rising, 0.5).map((each) => each.y)).toEqual([0, 0.5 / 0.75]);
  expect(smoothed(rising, 0)).toBe(rising);
});

test("nearest point", () => {
  const squares = [1, 4, 9].map((x) => ({ x, y: 0, step: x }));
  for (const [x, expected] of [[-5, 1], [2, 1], [3, 4], [6.4, 4], [7, 9], [99, 9]] as const) {
    expect(nearest(squares, x)?.x).toBe(expected);
  }
  expect(nearest([], 1)).toBeNull();
});

test("scales cover their values with round ticks", () => {
  for (const values of [[0.93, 6.2], [1e-5, 3e-4], [-3, 7], [5], [0], [1e6, 1e6 + 1], [-2, -2]]) {
    const result = scale(values, 4);
    for (const value of values) {
      expect(result.at(value)).toBeGreaterThanOrEqual(0);
      expect(result.at(value)).toBeLessThanOrEqual(1);
    }
    expect(result.ticks.length).toBeGreaterThan(1);
    expect(result.ticks.length).toBeLessThan(9);
  }
  expect(scale([0.93, 6.2], 4).ticks).toEqual([0, 2, 4, 6, 8]);
  expect(scale([], 4).ticks.length).toBeGreaterThan(1);
});

test("a logarithmic scale ignores values without a logarithm", () => {
  const result = scale([0, -1, 0.01, 100], 4, true);
  expect([result.at(0.01), result.at(1), result.at(100)]).toEqual([0, 0.5, 1]);
  expect(result.ticks).toEqual([0.01, 0.1, 1, 10, 100]);
  for (const values of [[2.1, 2.9], [3], [], [0]]) {
    expect(scale(values, 4, true).ticks.length).toBeGreaterThan(1);
  }
});

test("numbers are formatted by their magnitude", () => {
  expect([0, 2.34567, 0.00012, 12345.6, 1e9, -0.5, 1e-5].map((value) => formatNumber(value))).toEqual([
    "0", "2.346", "1.2e-4", "12,346", "1e+9", "-0.5", "1e-5",
  ]); // prettier-ignore
});

test("new rows are appended, and rows of a restarted run replace the old ones", () => {
  const steps = (...numbers: number[]) => numbers.map((step) => ({ step }));
  expect(appendRows(steps(1, 2), steps(3, 4))).toEqual(steps(1, 2, 3, 4));
  expect(appendRows(steps(1, 2, 3, 4), steps(3, 5))).toEqual(steps(1, 2, 3, 5));
  expect(appendRows(steps(1), [])).toEqual(steps(1));
});

test("configurations are compared by their leaf values", () => {
  const a = { lr: 0.1, model: { heads: 2 }, mix: null, list: [1, 2], same: "x" };
  const b = { lr: 0.2, model: { heads: 2, more: true }, mix: null, list: [1, 2], same: "x" };
  expect(differences([a, b])).toEqual([
    ["lr", ["0.1", "0.2"]],
    ["model.more", [undefined, "true"]],
  ]);
  expect(differences([a, b], true).map(([key]) => key)).toEqual([
    "list", "lr", "mix", "model.heads", "model.more", "same",
  ]); // prettier-ignore
  expect(differences([null])).toEqual([]);
});

test("values that differ only by rounding have a scale", () => {
  for (const [a, b] of [[1 / 3, 1 / 3 + 5.6e-17], [0.1, 0.1 + 1.4e-17], [-1e300, -1e300 * (1 - 1e-15)]]) {
    for (const log of [false, true]) {
      const { ticks, at } = scale([a!, b!], 4, log);
      expect(ticks.length).toBeLessThan(12);
      if (!log || a! > 0) expect(Math.abs(at(a!) - 0.5)).toBeLessThan(0.5);
    }
  }
});
