/** The page's language: a signal, so that changing it redraws every text. */

import { computed, effect, signal } from "@preact/signals";
import { strings, type Strings } from "./strings";

export type Language = keyof typeof strings;

const STORAGE_KEY = "khaosz.language";

function initialLanguage(): Language {
  const stored = localStorage.getItem(STORAGE_KEY);
  if (stored === "en" || stored === "zh") return stored;
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

export const language = signal<Language>(initialLanguage());

const texts = computed(() => strings[language.value]);

effect(() => {
  document.documentElement.lang = language.value === "zh" ? "zh-CN" : "en";
});

export function setLanguage(value: Language): void {
  localStorage.setItem(STORAGE_KEY, value);
  language.value = value;
}

type TextKey = { [K in keyof Strings]: Strings[K] extends string ? K : never }[keyof Strings];

/** A text in the page's language, with each `{name}` replaced by its value. */
export function t(key: TextKey, values: Record<string, string | number> = {}): string {
  return texts.value[key].replace(/\{(\w+)\}/g, (whole, name) => (Object.hasOwn(values, name) ? String(values[name]) : whole));
}

export function list<K extends "examples" | "shortcutList">(key: K): Strings[K] {
  return texts.value[key];
}

/** Bytes, in decimal units as disks have them. */
export function fileSize(bytes: number): string {
  if (bytes < 1000) return `${Math.round(bytes)} B`;
  if (bytes < 1e6) return `${number(bytes / 1000)} kB`;
  return bytes < 1e9 ? `${number(bytes / 1e6, bytes < 1e8 ? 1 : 0)} MB` : `${number(bytes / 1e9, 2)} GB`;
}

/** A number with the separators of the language, such as 12,345; a dash for what is none. */
export function number(value: number, digits = 0): string {
  if (!Number.isFinite(value)) return "–";
  return value.toLocaleString(language.value, {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  });
}
