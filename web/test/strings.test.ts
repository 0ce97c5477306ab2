import { expect, test } from "vitest";
import { strings } from "../src/strings";

const { en, zh } = strings;
const holes = (text: string) => (text.match(/\{\w+\}/g) ?? []).sort();

test("both languages say everything, with the same holes to fill", () => {
  expect(Object.keys(zh)).toEqual(Object.keys(en));
  for (const key of Object.keys(en) as (keyof typeof en)[]) {
    const [ours, theirs] = [en[key], zh[key]];
    if (typeof ours === "string") {
      expect(ours.trim(), key).not.toBe("");
      expect(holes(theirs as string), key).toEqual(holes(ours));
    } else expect(theirs, key).toHaveLength(ours.length);
  }
});

test("Chinese is Chinese", () => {
  const same = Object.keys(en).filter((key) => en[key as "chat"] === zh[key as "chat"]);
  expect(same).toEqual(["topP"]);
});
