/** A ranking that is being made: levels of answers, the best first, equals in one level. */

export type Ranking = number[][];

export function ranked(ranking: Ranking): number[] {
  return ranking.flat();
}

/** The next best, or as good as the last one. The only answer that is left then comes last. */
export function add(ranking: Ranking, answer: number, count: number, tied = false): Ranking {
  if (ranked(ranking).includes(answer)) return ranking;
  const last = ranking.at(-1);
  const next = tied && last ? [...ranking.slice(0, -1), [...last, answer]] : [...ranking, [answer]];
  const left = Array.from({ length: count }, (_, i) => i).filter((i) => !ranked(next).includes(i));
  return left.length === 1 ? [...next, left] : next;
}

export function without(ranking: Ranking, answer: number): Ranking {
  return ranking.map((level) => level.filter((each) => each !== answer)).filter((each) => each.length);
}

/** By itself before the level that `before` is in; null: at the end. */
export function put(ranking: Ranking, answer: number, before: number | null): Ranking {
  if (answer === before) return ranking;
  const rest = without(ranking, answer);
  const at = before === null ? -1 : rest.findIndex((level) => level.includes(before));
  return at < 0 ? [...rest, [answer]] : [...rest.slice(0, at), [answer], ...rest.slice(at)];
}

/** A place further up or down; across a border between levels it first becomes a level. */
export function move(ranking: Ranking, answer: number, by: 1 | -1): Ranking {
  const order = ranked(ranking);
  const at = order.indexOf(answer);
  const to = at + by;
  if (at < 0 || to < 0 || to >= order.length) return ranking;
  const rest = order.filter((each) => each !== answer);
  return put(ranking, answer, rest[to] ?? null);
}

/** Whether the answers at `at` and behind it in the order are equal: the other way round. */
export function toggleTie(ranking: Ranking, at: number): Ranking {
  let seen = 0;
  for (const [i, level] of ranking.entries()) {
    const within = at - seen;
    if (within < level.length - 1) {
      const parts = [level.slice(0, within + 1), level.slice(within + 1)];
      return [...ranking.slice(0, i), ...parts, ...ranking.slice(i + 1)];
    }
    if (within === level.length - 1 && i < ranking.length - 1) {
      return [...ranking.slice(0, i), [...level, ...ranking[i + 1]!], ...ranking.slice(i + 2)];
    }
    seen += level.length;
  }
  return ranking;
}

/** Place of an answer: 1 for the best; null where it has none yet. */
export function placeOf(ranking: Ranking, answer: number): number | null {
  const at = ranking.findIndex((level) => level.includes(answer));
  return at < 0 ? null : ranked(ranking.slice(0, at)).length + 1;
}

/** All answers have a place, and there is something to be learnt from it. */
export function complete(ranking: Ranking, count: number): boolean {
  return ranked(ranking).length === count && ranking.length > 1;
}

/** Prompts of a file: JSON lines or one JSON list of records as for training, or a line each. */
export function promptsOf(text: string): string[] {
  const records = parsed(text) ?? text.split(/\r?\n/).map((line) => parsed(line)?.[0] ?? line);
  return records.map(promptOf).filter((each) => each.trim());
}

function parsed(text: string): unknown[] | null {
  try {
    const found: unknown = JSON.parse(text);
    if (Array.isArray(found)) return found;
    return found !== null && typeof found === "object" ? [found] : null;
  } catch {
    return null;
  }
}

function promptOf(record: unknown): string {
  if (typeof record === "string") return record;
  if (record === null || typeof record !== "object") return "";
  const { prompt, messages, instruction, question } = record as Record<string, unknown>;
  for (const given of [prompt, messages, instruction, question]) {
    if (typeof given === "string") return given;
    if (Array.isArray(given)) {
      const said = given.findLast((each) => each?.role === "user")?.content;
      if (typeof said === "string") return said;
    }
  }
  return "";
}
