import { Dialog } from "../components/dialog";
import { t } from "../i18n";
import type { Settings } from "../tree";
import { update } from "./persistence";
import { contextUse } from "./composer";
import { current, model, promptSize } from "./state";

type Numeric = Exclude<keyof Settings, "stop">;

const fields: [Numeric, Parameters<typeof t>[0], number, number, number][] = [
  ["temperature", "temperature", 0, 2, 0.05],
  ["top_p", "topP", 0.05, 1, 0.05],
  ["max_tokens", "maxTokens", 1, 131072, 1],
  ["seed", "seed", 0, 2 ** 31 - 1, 1],
  ["presence_penalty", "presencePenalty", -2, 2, 0.1],
  ["frequency_penalty", "frequencyPenalty", -2, 2, 0.1],
];

/** System prompt and sampling settings of this conversation; empty fields use the server's defaults. */
export function ChatSettings(props: { onClose: () => void }) {
  const { settings } = current.value;
  const set = (change: Partial<Settings>) => {
    const entries = Object.entries({ ...settings, ...change });
    const defined = entries.filter(([, value]) => value !== undefined);
    update({ settings: Object.fromEntries(defined) as Settings });
  };
  return (
    <Dialog title={t("chatSettings")} side onClose={props.onClose}>
      <div class="form">
        <label>
          <span>{t("systemPrompt")}</span>
          <textarea
            rows={5}
            placeholder={t("systemHint")}
            value={current.value.system ?? ""}
            onInput={(event) => update({ system: event.currentTarget.value || null })}
          />
        </label>
        <div class="grid">
          {fields.map(([name, label, min, max, step]) => (
            <label key={name}>
              <span>{t(label)}</span>
              <input
                type="number"
                min={min}
                max={max}
                step={step}
                placeholder={t("defaultValue")}
                value={settings[name] ?? ""}
                onChange={(event) => {
                  const { value, valueAsNumber, validity } = event.currentTarget;
                  if (value === "") set({ [name]: undefined });
                  else if (!validity.rangeOverflow && !validity.rangeUnderflow) {
                    set({ [name]: valueAsNumber });
                  }
                }}
              />
            </label>
          ))}
        </div>
        <label>
          <span>{t("stopSequences")}</span>
          <textarea
            rows={2}
            value={(settings.stop ?? []).join("\n")}
            onChange={(event) => {
              const lines = event.currentTarget.value.split("\n").filter(Boolean);
              set({ stop: lines.length ? lines : undefined } as Partial<Settings>);
            }}
          />
        </label>
        {model.value?.context && promptSize.value && (
          <p class="note">{contextUse(promptSize.value, model.value.context).label}</p>
        )}
        <button type="button" onClick={() => update({ settings: {}, system: null })}>
          {t("reset")}
        </button>
      </div>
    </Dialog>
  );
}
