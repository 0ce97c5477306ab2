import { useSignal } from "@preact/signals";
import { useId } from "preact/hooks";
import { Icon } from "../components/icons";
import { number, t } from "../i18n";
import type { Settings } from "../tree";
import { FIELDS, isThinking, modelDefaults, type Defaults, type Field } from "./sampling";
import { model } from "./state";

/** System prompt and sampling; an empty field is the model's own value, which it shows. */
export function SamplingForm(props: Defaults & { onChange: (change: Partial<Defaults>) => void }) {
  const { system, settings, onChange } = props;
  const own = modelDefaults(model.value, settings);
  const thinks = isThinking(model.value, { ...settings, thinking: true });
  const set = (change: Partial<Settings>) => {
    const entries = Object.entries({ ...settings, ...change });
    onChange({ settings: Object.fromEntries(entries.filter(([, value]) => value !== undefined)) as Settings });
  };
  return (
    <>
      <label>
        <span>{t("systemPrompt")}</span>
        <textarea
          rows={5}
          placeholder={t("systemHint")}
          value={system ?? ""}
          onInput={(event) => onChange({ system: event.currentTarget.value || null })}
        />
      </label>
      <div class="grid">
        {FIELDS.filter(({ name }) => name !== "thinking_budget" || thinks).map((field) => (
          <NumberField
            key={field.name}
            field={field}
            value={settings[field.name]}
            own={own[field.name] ?? null}
            onChange={(value) => set({ [field.name]: value })}
          />
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
    </>
  );
}

function NumberField(props: {
  field: Field;
  value: number | undefined;
  own: number | null;
  onChange: (value: number | undefined) => void;
}) {
  const { field, value, own } = props;
  const { name, label, min, max, step } = field;
  const id = useId();
  /** What was typed and cannot be used. */
  const invalid = useSignal<string | null>(null);
  const none = name === "seed" ? t("randomSeed") : t("noLimit");
  const otherwise = field.neutral === null ? none : t("defaultValue", { n: text(field.neutral) });
  const placeholder = own === null ? otherwise : t("modelValue", { n: text(own) });
  const onInput = (event: Event) => {
    const input = event.currentTarget as HTMLInputElement;
    const typed = input.valueAsNumber;
    const fits = typed >= min && typed <= max && (step < 1 || Number.isInteger(typed));
    const isEmpty = input.value === "" && !input.validity.badInput;
    invalid.value = isEmpty || fits ? null : input.value;
    if (isEmpty) props.onChange(undefined);
    else if (fits) props.onChange(typed);
  };
  const reset = () => {
    invalid.value = null;
    props.onChange(undefined);
  };
  const range = max >= 1e6 ? t("atLeast", { min: number(min) }) : t("between", { min: text(min), max: text(max) });
  return (
    <div class="number-field">
      <label for={id}>
        <span id={`${id}-label`}>{t(label)}</span>
      </label>
      <span class="number-row">
        <input
          id={id}
          type="number"
          min={min}
          max={max}
          step={step}
          placeholder={placeholder}
          value={invalid.value ?? value ?? ""}
          aria-invalid={invalid.value !== null}
          aria-describedby={invalid.value === null ? undefined : `${id}-error`}
          onInput={onInput}
        />
        {(value !== undefined || invalid.value !== null) && (
          <button
            type="button"
            class="quiet"
            aria-label={t("resetField")}
            aria-describedby={`${id}-label`}
            title={t("resetField")}
            onClick={reset}
          >
            <Icon name="close" />
          </button>
        )}
      </span>
      {invalid.value !== null && (
        <span id={`${id}-error`} class="field-error" role="alert">
          {`${step < 1 ? "" : t("wholeNumber")}${range}`}
        </span>
      )}
    </div>
  );
}

function text(value: number): string {
  return String(Number(value.toPrecision(6)));
}
