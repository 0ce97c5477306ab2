import { useSignal } from "@preact/signals";
import { met } from "./api";
import { importAll } from "./chat/keeping";
import { explain } from "./chat/state";
import { language, list, speak, t, type Language } from "./i18n";
import { keeper } from "./keep";
import { theme, type Theme } from "./theme";

export function SettingsView() {
  const told = useSignal("");
  const save = async () => {
    let text: string;
    try {
      text = JSON.stringify({ conversations: await keeper().all() }, null, 1);
    } catch (error) {
      told.value = explain(error);
      return;
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "khaosz-conversations.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  };
  const load = async (event: Event) => {
    const input = event.currentTarget as HTMLInputElement;
    const file = input.files?.[0];
    input.value = "";
    if (!file) return;
    try {
      told.value = t("imported", { n: await importAll(await file.text()) });
    } catch (error) {
      told.value = error instanceof SyntaxError ? t("importFailed") : explain(error);
    }
  };
  return (
    <div class="page">
      <h1>{t("settings")}</h1>
      <Choice
        label={t("language")}
        value={language.value}
        options={[
          ["en", "English"],
          ["zh", "中文"],
        ]}
        onChoose={(value) => speak(value as Language)}
      />
      <Choice
        label={t("theme")}
        value={theme.value}
        options={[
          ["system", t("system")],
          ["light", t("light")],
          ["dark", t("dark")],
        ]}
        onChoose={(value) => (theme.value = value as Theme)}
      />
      <h2>{t("conversations")}</h2>
      <div class="row">
        <button type="button" disabled={!met.value} onClick={() => void save()}>
          {t("exportAll")}
        </button>
        <label class="button">
          {t("importFile")}
          <input class="sr-only" type="file" accept="application/json,.json" disabled={!met.value} onChange={load} />
        </label>
        <span role="status">{told.value}</span>
      </div>
      <h2>{t("keys")}</h2>
      <Keys />
      <p class="note">{t("local")}</p>
    </div>
  );
}

export function Keys() {
  return (
    <dl class="keys">
      {list("keyHelp").map(([key, what]) => (
        <div key={key}>
          <dt>
            {key!.split(" ").map((each) => (
              <kbd key={each}>{each}</kbd>
            ))}
          </dt>
          <dd>{what}</dd>
        </div>
      ))}
    </dl>
  );
}

function Choice(props: {
  label: string;
  value: string;
  options: [string, string][];
  onChoose: (value: string) => void;
}) {
  return (
    <fieldset class="choice">
      <legend>{props.label}</legend>
      {props.options.map(([value, label]) => (
        <label key={value}>
          <input
            type="radio"
            name={props.label}
            checked={value === props.value}
            onChange={() => props.onChoose(value)}
          />
          <span>{label}</span>
        </label>
      ))}
    </fieldset>
  );
}
