/** A ranking in progress: levels of answers, best first; tied answers share a level. */

export type Ranking = number[][];

export function rankedAnswers(ranking: Ranking): number[] {
  return ranking.flat();
}

/** Rank an answer next, or tied with the last one. A single remaining answer is ranked last. */
export function add(ranking: Ranking, answer: number, count: number, tied = false): Ranking {
  if (rankedAnswers(ranking).includes(answer)) return ranking;
  const last = ranking.at(-1);
  const next = tied && last ? [...ranking.slice(0, -1), [...last, answer]] : [...ranking, [answer]];
  const rest = Array.from({ length: count }, (_, i) => i).filter((i) => !rankedAnswers(next).includes(i));
  return rest.length === 1 ? [...next, rest] : next;
}

export function without(ranking: Ranking, answer: number): Ranking {
  return ranking.map((level) => level.filter((each) => each !== answer)).filter((each) => each.length);
}

/** Move an answer to a level of its own before that of `before`; null: at the end. */
export function put(ranking: Ranking, answer: number, before: number | null): Ranking {
  if (answer === before) return ranking;
  const rest = without(ranking, answer);
  const index = before === null ? -1 : rest.findIndex((level) => level.includes(before));
  return index < 0 ? [...rest, [answer]] : [...rest.slice(0, index), [answer], ...rest.slice(index)];
}

/** Move an answer up or down by one rank, to a level of its own. */
export function move(ranking: Ranking, answer: number, by: 1 | -1): Ranking {
  const order = rankedAnswers(ranking);
  const from = order.indexOf(answer);
  const to = from + by;
  if (from < 0 || to < 0 || to >= order.length) return ranking;
  const rest = order.filter((each) => each !== answer);
  return put(ranking, answer, rest[to] ?? null);
}

/** Tie or separate the answers at positions `index` and `index + 1` of the order. */
export function toggleTie(ranking: Ranking, index: number): Ranking {
  let seen = 0;
  for (const [i, level] of ranking.entries()) {
    const within = index - seen;
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

/** Rank of an answer, 1 for the best, or null if it is not ranked. */
export function rankOf(ranking: Ranking, answer: number): number | null {
  const index = ranking.findIndex((level) => level.includes(answer));
  return index < 0 ? null : rankedAnswers(ranking.slice(0, index)).length + 1;
}

/** All answers are ranked, and not all are tied. */
export function isComplete(ranking: Ranking, count: number): boolean {
  return rankedAnswers(ranking).length === count && ranking.length > 1;
}

/** Prompts of a file: JSON Lines or a JSON array of training records, or one prompt per line. */
export function promptsOf(text: string): string[] {
  const records = parseRecords(text) ?? text.split(/\r?\n/).map((line) => parseRecords(line)?.[0] ?? line);
  return records.map(promptOf).filter((each) => each.trim());
}

function parseRecords(text: string): unknown[] | null {
  try {
    const value: unknown = JSON.parse(text);
    if (Array.isArray(value)) return value;
    return value !== null && typeof value === "object" ? [value] : null;
  } catch {
    return null;
  }
}

function promptOf(record: unknown): string {
  if (typeof record === "string") return record;
  if (record === null || typeof record !== "object") return "";
  const { prompt, messages, instruction, question } = record as Record<string, unknown>;
  for (const field of [prompt, messages, instruction, question]) {
    if (typeof field === "string") return field;
    if (Array.isArray(field)) {
      const content = field.findLast((each) => each?.role === "user")?.content;
      if (typeof content === "string") return content;
    }
  }
  return "";
}
