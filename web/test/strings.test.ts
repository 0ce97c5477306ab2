import { expect, test } from "vitest";
import { strings } from "../src/strings";

const { en, zh } = strings;
const placeholders = (text: string) => [...new Set(text.match(/\{\w+\}/g))].sort();

test("both languages have all texts, with the same placeholders", () => {
  expect(Object.keys(zh)).toEqual(Object.keys(en));
  for (const key of Object.keys(en) as (keyof typeof en)[]) {
    const [english, chinese] = [en[key], zh[key]];
    if (typeof english === "string") {
      expect(english.trim(), key).not.toBe("");
      expect(placeholders(chinese as string), key).toEqual(placeholders(english));
    } else expect(chinese, key).toHaveLength(english.length);
  }
});

test("Chinese texts are translated", () => {
  const same = Object.keys(en).filter((key) => en[key as "chat"] === zh[key as "chat"]);
  expect(same).toEqual(["topP", "topK", "minP"]);
});
