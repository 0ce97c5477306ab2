/** The page's language: a signal, so that a switch redraws whatever was said. */

import { computed, effect, signal } from "@preact/signals";
import { strings, type Strings } from "./strings";

export type Language = keyof typeof strings;

const KEPT = "khaosz.language";

function first(): Language {
  const kept = localStorage.getItem(KEPT);
  if (kept === "en" || kept === "zh") return kept;
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

export const language = signal<Language>(first());

const words = computed(() => strings[language.value]);

effect(() => {
  document.documentElement.lang = language.value === "zh" ? "zh-CN" : "en";
});

export function speak(chosen: Language): void {
  localStorage.setItem(KEPT, chosen);
  language.value = chosen;
}

type Simple = { [K in keyof Strings]: Strings[K] extends string ? K : never }[keyof Strings];

/** A text in the page's language, with `{name}`s filled in. */
export function t(key: Simple, values: Record<string, string | number> = {}): string {
  return words.value[key].replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole));
}

export function list<K extends "examples" | "keyHelp">(key: K): Strings[K] {
  return words.value[key];
}

/** 12,345 as the language writes it. */
export function number(value: number, digits = 0): string {
  return value.toLocaleString(language.value, {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  });
}
