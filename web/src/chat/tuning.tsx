import { Dialog } from "../components/dialog";
import { t } from "../i18n";
import type { Settings } from "../tree";
import { update } from "./keeping";
import { current } from "./state";

type Numeric = Exclude<keyof Settings, "stop">;

const fields: [Numeric, Parameters<typeof t>[0], number, number, number][] = [
  ["temperature", "temperature", 0, 2, 0.05],
  ["top_p", "topP", 0.05, 1, 0.05],
  ["max_tokens", "maxTokens", 1, 131072, 1],
  ["seed", "seed", 0, 2 ** 31 - 1, 1],
  ["presence_penalty", "presence", -2, 2, 0.1],
  ["frequency_penalty", "frequency", -2, 2, 0.1],
];

/** System prompt and sampling of this conversation; what is left empty is the server's default. */
export function Tuning(props: { onClose: () => void }) {
  const { settings } = current.value;
  const set = (change: Partial<Settings>) => {
    const entries = Object.entries({ ...settings, ...change });
    const kept = entries.filter(([, value]) => value !== undefined);
    update({ settings: Object.fromEntries(kept) as Settings });
  };
  return (
    <Dialog title={t("sampling")} side onClose={props.onClose}>
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
                placeholder={t("byDefault")}
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
          <span>{t("stopAt")}</span>
          <textarea
            rows={2}
            value={(settings.stop ?? []).join("\n")}
            onChange={(event) => {
              const lines = event.currentTarget.value.split("\n").filter(Boolean);
              set({ stop: lines.length ? lines : undefined } as Partial<Settings>);
            }}
          />
        </label>
        <button type="button" onClick={() => update({ settings: {}, system: null })}>
          {t("reset")}
        </button>
      </div>
    </Dialog>
  );
}
