import { useSignal } from "@preact/signals";
import { t } from "../i18n";
import { Swatch } from "./chart";
import { differences } from "./series";
import { details } from "./state";

/** The configuration of one run, or the differences between several. */
export function Configuration(props: { ids: string[] }) {
  const showAll = useSignal(false);
  const known = props.ids.filter((id) => details.value.has(id));
  if (!known.length) return null;
  const several = known.length > 1;
  const configs = known.map((id) => {
    const { config, plan } = details.value.get(id)!.config;
    return { ...config, plan };
  });
  const rows = differences(configs, showAll.value || !several).filter(([key]) => key !== "out");
  const table = rows.length ? (
    <div class="wide-table">
      <table class="settings">
        <thead>
          <tr>
            <th scope="col">{t("configKey")}</th>
            {known.map((id) => (
              <th key={id} scope="col">
                {several && <Swatch colour={props.ids.indexOf(id)} />} {id}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map(([key, values]) => (
            <tr key={key}>
              <th scope="row">{key}</th>
              {values.map((value, i) => (
                <td key={known[i]}>{value ?? "–"}</td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  ) : (
    <p class="note">{t("noDifferences")}</p>
  );
  if (!several) {
    return (
      <details class="configuration">
        <summary>{t("configuration")}</summary>
        {table}
      </details>
    );
  }
  return (
    <section class="configuration">
      <div class="row spread">
        <h2>{t("differences")}</h2>
        <label class="check">
          <input
            type="checkbox"
            checked={showAll.value}
            onChange={(event) => (showAll.value = event.currentTarget.checked)}
          />{" "}
          {t("allKeys")}
        </label>
      </div>
      {table}
    </section>
  );
}
