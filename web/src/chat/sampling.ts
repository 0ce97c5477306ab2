/** Sampling settings: their ranges, what the model has by default, and what is in force. */

import { signal } from "@preact/signals";
import type { ModelCard } from "../api";
import type { t } from "../i18n";
import { newConversation, type Conversation, type Settings } from "../tree";
import { validateSettings } from "../validateConversation";

export type Numeric = Exclude<keyof Settings, "stop" | "thinking">;

export interface Field {
  name: Numeric;
  label: Parameters<typeof t>[0];
  min: number;
  max: number;
  step: number;
  /** What holds where the model says nothing; null: a word says it. */
  neutral: number | null;
}

const whole = { step: 1 };
export const FIELDS: Field[] = [
  { name: "temperature", label: "temperature", min: 0, max: 2, step: 0.05, neutral: 1 },
  { name: "top_p", label: "topP", min: 0, max: 1, step: 0.05, neutral: 1 },
  { name: "top_k", label: "topK", min: 0, max: 1_000_000, ...whole, neutral: 0 },
  { name: "min_p", label: "minP", min: 0, max: 0.99, step: 0.01, neutral: 0 },
  { name: "repetition_penalty", label: "repetitionPenalty", min: 0.01, max: 100, step: 0.05, neutral: 1 },
  { name: "presence_penalty", label: "presencePenalty", min: -2, max: 2, step: 0.1, neutral: 0 },
  { name: "frequency_penalty", label: "frequencyPenalty", min: -2, max: 2, step: 0.1, neutral: 0 },
  { name: "max_tokens", label: "maxTokens", min: 1, max: 131072, ...whole, neutral: 1024 },
  { name: "seed", label: "seed", min: 0, max: Number.MAX_SAFE_INTEGER, ...whole, neutral: null },
  { name: "thinking_budget", label: "thinkingBudget", min: 0, max: 131072, ...whole, neutral: null },
];

/** Of a model that nothing is known of; they belong together, as on the server. */
const FALLBACK = { temperature: 0.8, top_p: 0.95 };
const PENALTIES = ["repetition_penalty", "presence_penalty", "frequency_penalty"];

/** What the model's own values are, beside these settings; as the server's `sampling_values`. */
export function modelDefaults(model: ModelCard | null, settings: Settings): Record<string, number> {
  const own = model?.sampling ?? {};
  const isFallback = JSON.stringify(own) === JSON.stringify(FALLBACK);
  if (settings.temperature !== undefined && isFallback) return {};
  const entries = Object.entries(own);
  // Temperature 0 asks for the likeliest tokens.
  return Object.fromEntries(settings.temperature === 0 ? entries.filter(([name]) => !PENALTIES.includes(name)) : entries);
}

/** What is in force for an answer, to be saved with it. */
export function inForce(model: ModelCard, settings: Settings): Record<string, number | boolean> {
  const { stop: _, thinking: __, ...numeric } = settings;
  const defaults: Record<string, number> = { max_tokens: 1024, ...modelDefaults(model, settings) };
  const thinks = isThinking(model, settings);
  if (!thinks) delete numeric.thinking_budget;
  return { ...defaults, ...numeric, ...(model.thinking && model.thinking !== "none" ? { thinking: thinks } : {}) };
}

export function canSwitch(model: ModelCard | null): boolean {
  return model?.thinking === "switch_on" || model?.thinking === "switch_off";
}

export function isThinking(model: ModelCard | null, settings: Settings): boolean {
  if (!canSwitch(model)) return model?.thinking === "always";
  return settings.thinking ?? model!.thinking === "switch_on";
}

/** The settings as fields of a request. */
export function requestSettings(model: ModelCard, settings: Settings): Record<string, unknown> {
  const { thinking, thinking_budget, ...rest } = settings;
  return {
    ...rest,
    ...(canSwitch(model) && thinking !== undefined ? { chat_template_kwargs: { enable_thinking: thinking } } : {}),
    ...(thinking_budget !== undefined && isThinking(model, settings) ? { thinking_budget } : {}),
  };
}

// ---- Defaults of new conversations

const STORAGE_KEY = "khaosz.defaults";

export interface Defaults {
  system: string | null;
  settings: Settings;
}

function stored(): Defaults {
  try {
    const { system, settings } = JSON.parse(localStorage.getItem(STORAGE_KEY) ?? "{}");
    return { system: typeof system === "string" && system ? system : null, settings: validateSettings(settings) };
  } catch {
    return { system: null, settings: {} };
  }
}

export const defaults = signal<Defaults>(stored());

export function setDefaults(value: Defaults): void {
  localStorage.setItem(STORAGE_KEY, JSON.stringify(value));
  defaults.value = value;
}

/** A new conversation, which has the user's defaults as its own. */
export function freshConversation(): Conversation {
  return { ...newConversation(), ...defaults.value };
}
